//! Requests and answers as they are in guest memory (virtio 1.2, section 5.15.6).

/// Bytes of a request.
pub(super) const REQUEST_SIZE: usize = 24;

/// Bytes of an answer.
pub(super) const ANSWER_SIZE: usize = 10;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// What a guest asks for. The numbers are the guest's, unchecked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Plug { address: u64, count: u16 },
    Unplug { address: u64, count: u16 },
    UnplugAll,
    State { address: u64, count: u16 },
}

/// What it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// Done.
    Done,
    /// What the blocks asked about are.
    State(BlockState),
    /// The guest has as much as it is to have.
    Refused,
    /// The host cannot now.
    Busy,
    /// The request makes no sense.
    Error,
}

/// What some blocks are together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockState {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

impl Request {
    /// Understands a copy of a request; none if it is of no known type.
    pub(super) fn parse(bytes: &[u8; REQUEST_SIZE]) -> Option<Self> {
        let [a, b, _, _, _, _, _, _, address @ .., c, d, _, _, _, _, _, _] = *bytes;
        let address = u64::from_le_bytes(address);
        let count = u16::from_le_bytes([c, d]);
        match u16::from_le_bytes([a, b]) {
            PLUG => Some(Self::Plug { address, count }),
            UNPLUG => Some(Self::Unplug { address, count }),
            UNPLUG_ALL => Some(Self::UnplugAll),
            STATE => Some(Self::State { address, count }),
            _ => None,
        }
    }
}

impl Answer {
    /// As it goes into guest memory.
    pub(super) fn bytes(self) -> [u8; ANSWER_SIZE] {
        let (kind, state) = match self {
            Self::Done => (0, 0),
            Self::State(state) => (0, state as u8),
            Self::Refused => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
        };
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let mut bytes = [0xee; REQUEST_SIZE];
        bytes[8..16].copy_from_slice(&0x1_2345_6789_u64.to_le_bytes());
        bytes[16..18].copy_from_slice(&0x0a0b_u16.to_le_bytes());
        let (address, count) = (0x1_2345_6789, 0x0a0b);
        for (kind, request) in [
            (0, Some(Request::Plug { address, count })),
            (1, Some(Request::Unplug { address, count })),
            (2, Some(Request::UnplugAll)),
            (3, Some(Request::State { address, count })),
            (4, None),
            (0x100, None),
        ] {
            bytes[..2].copy_from_slice(&u16::to_le_bytes(kind));
            assert_eq!(Request::parse(&bytes), request, "{kind}");
        }
        assert_eq!(Answer::State(BlockState::Mixed).bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!(Answer::Error.bytes()[0], 3);
    }
}
