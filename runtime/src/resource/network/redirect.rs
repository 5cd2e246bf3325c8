//! An interface joined with a tap by traffic control: an ingress queueing discipline on each, with
//! one filter that sends every frame out by the other.

use std::io;
use std::path::Path;

use futures::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};

use super::{Namespace, NetworkError};
use crate::apart::apart;

/// The priority of our filter, by which a discipline is known as ours ("HU").
const PRIORITY: u16 = 0x4855;

/// Every protocol, as the kernel wants it here.
const ALL: u16 = 0x0003_u16.to_be();

/// Joins two interfaces. One that has an ingress discipline already is left alone.
pub async fn join(netlink: &Handle, interface: u32, tap: u32) -> Result<(), NetworkError> {
    for (from, to) in [(interface, tap), (tap, interface)] {
        if let Err(error) = send_on(netlink, from, to).await {
            part(netlink, interface).await;
            return Err(error);
        }
    }
    Ok(())
}

async fn send_on(netlink: &Handle, from: u32, to: u32) -> Result<(), NetworkError> {
    let index = from.cast_signed();
    if has_ingress(netlink, from).await? {
        // What a sandbox that was killed has left sends frames to nowhere.
        if !is_ours(netlink, from).await? {
            return Err(NetworkError::Occupied);
        }
        part(netlink, from).await;
    }
    netlink
        .qdisc()
        .add(index)
        .ingress()
        .execute()
        .await
        .map_err(NetworkError::netlink("cannot add an ingress queueing discipline"))?;
    let failed = "cannot redirect the frames of an interface (modules cls_u32, act_mirred)";
    netlink
        .traffic_filter(index)
        .add()
        .ingress()
        .priority(PRIORITY)
        .protocol(ALL)
        .redirect(to)
        .map_err(NetworkError::netlink(failed))?
        .execute()
        .await
        .map_err(NetworkError::netlink(failed))
}

/// Takes the discipline of an interface away again, if it is ours.
pub async fn part(netlink: &Handle, interface: u32) {
    // Errors: the interface has gone, and all with it.
    if !is_ours(netlink, interface).await.unwrap_or(false) {
        return;
    }
    let mut request = netlink.qdisc().del(interface.cast_signed());
    request.message_mut().header.parent = TcHandle::INGRESS;
    let _ = request.execute().await;
}

/// Takes our disciplines away in the namespace at `path`, where a sandbox was killed; without an
/// asynchronous runtime about.
pub fn clear(path: &Path) {
    let clear = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let namespace = Namespace::open(path).map_err(io::Error::other)?;
            let netlink = namespace.netlink();
            let links = netlink.link().get().execute().try_collect::<Vec<_>>().await;
            for link in links.map_err(io::Error::other)? {
                part(netlink, link.header.index).await;
            }
            Ok::<(), io::Error>(())
        })
    };
    // The namespace has mostly gone; then there is nothing in it either.
    let _ = apart(clear);
}

async fn has_ingress(netlink: &Handle, interface: u32) -> Result<bool, NetworkError> {
    let listed = netlink.qdisc().get().execute().try_collect::<Vec<_>>().await;
    let listed = listed.map_err(NetworkError::netlink("cannot list queueing disciplines"))?;
    Ok(listed.iter().any(|one| {
        one.header.index == interface.cast_signed()
            && matches!(kind(one), Some("ingress" | "clsact"))
    }))
}

async fn is_ours(netlink: &Handle, interface: u32) -> Result<bool, NetworkError> {
    let listed = netlink
        .traffic_filter(interface.cast_signed())
        .get()
        .ingress()
        .execute()
        .try_collect::<Vec<_>>()
        .await
        .map_err(NetworkError::netlink("cannot list filters"))?;
    Ok(listed.iter().any(|one| TcHandle::from(one.header.info).major == PRIORITY))
}

fn kind(message: &TcMessage) -> Option<&str> {
    message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    })
}
