//! Names that the guest removes and renames: nodes follow them.

use std::ffi::CStr;
use std::io;
use std::sync::{Arc, PoisonError};

use super::node::{Node, Nodes};
use super::system::Status;
use super::table::{Opened, Place, Table};

/// What a name was before it is removed or renamed.
#[derive(Debug)]
pub struct Before {
    place: Place,
    node: Option<Node>,
}

impl Before {
    /// Whether the file has no name left, though it may have been found at more places: one name can be
    /// reached by several mounts.
    fn is_unlinked(&self) -> bool {
        let links = |node: &Node| Status::of(&node.file).map(|status| status.links());
        self.node.as_ref().is_some_and(|node| links(node).is_ok_and(|links| links == 0))
    }
}

impl Nodes {
    /// Looks at what a name is before it is removed or renamed.
    pub fn before(&self, folder: &Node, name: &CStr) -> Before {
        let place = (folder.number, Arc::from(name));
        let number = self.table().at(&place);
        let node = number.and_then(|number| self.get(number).ok());
        Before { place, node }
    }

    /// Notes that the name was removed.
    pub fn removed(&self, before: Before) {
        let unlinked = before.is_unlinked();
        let mut table = self.change();
        let descriptor = self.to_pin(&table, &before);
        table.take(&before.place, descriptor, unlinked);
    }

    fn to_pin(&self, table: &Table, before: &Before) -> Option<Opened> {
        let node = before.node.as_ref()?;
        (table.pinned() < self.limits.pinned).then(|| node.opened())
    }

    /// Renames by `rename`, and follows it.
    pub fn rename(
        &self,
        from: (&Node, &CStr),
        to: (&Node, &CStr),
        exchange: bool,
        rename: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let (from, to) = (self.before(from.0, from.1), self.before(to.0, to.1));
        {
            let _alone = self.renames.write().unwrap_or_else(PoisonError::into_inner);
            rename()?;
            let unlinked = to.is_unlinked();
            let mut table = self.change();
            let over = (self.to_pin(&table, &to), unlinked);
            table.moved(from.place, to.place, exchange, over);
        }
        // Moving copies up.
        for node in [from.node, to.node].into_iter().flatten() {
            if let Ok(status) = Status::of(&node.file) {
                self.observe(&node, &status);
            }
        }
        Ok(())
    }
}
