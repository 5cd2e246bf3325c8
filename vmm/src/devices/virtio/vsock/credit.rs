//! Credit: how much each side may still send (virtio 1.2, section 5.10.6.3). Counters wrap.

/// Bytes of one connection that the guest may have under way.
pub const BUFFER: u32 = 256 * 1024;

/// The counters of one connection.
#[derive(Debug, Clone, Copy, Default)]
pub struct Credit {
    /// The guest's buffer, as it last said.
    guest_buffer: u32,
    /// What the guest has consumed, as it last said.
    guest_consumed: u32,
    /// What we have sent.
    sent: u32,
    /// What the guest has sent.
    received: u32,
    /// Of that, what the host end has taken.
    forwarded: u32,
    /// What of that the guest knows.
    told: u32,
}

impl Credit {
    /// Takes what a header of the guest's says.
    pub fn learn(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_buffer = buf_alloc;
        self.guest_consumed = fwd_cnt;
    }

    /// Bytes the guest can take now. A guest that claims to have consumed more than it was sent
    /// gets nothing.
    pub fn room(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_consumed);
        self.guest_buffer.saturating_sub(under_way)
    }

    /// `count` bytes, no more than [`Credit::room`], were sent.
    pub fn send(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// `count` bytes have come; `false` if the guest had no right to send them.
    pub fn receive(&mut self, count: u32) -> bool {
        let kept = self.received.wrapping_sub(self.forwarded);
        let fits = kept.checked_add(count).is_some_and(|total| total <= BUFFER);
        if fits {
            self.received = self.received.wrapping_add(count);
        }
        fits
    }

    /// `count` of the bytes that came are out of our hands.
    pub fn forward(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count);
    }

    /// Whether the guest should hear of the room it has regained: at half the buffer, so that it
    /// neither runs dry nor is told with every packet.
    pub fn is_update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= BUFFER / 2
    }

    /// The counter for a header; the guest will know it from then on.
    pub fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.forwarded
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_may_be_sent_before_the_guest_said_so() {
        let mut credit = Credit::default();
        assert_eq!(credit.room(), 0);
        credit.learn(100, 0);
        assert_eq!(credit.room(), 100);
        credit.send(60);
        assert_eq!(credit.room(), 40);
        credit.learn(100, 60);
        assert_eq!(credit.room(), 100);
        credit.send(50);
        credit.learn(20, 60);
        assert_eq!(credit.room(), 0, "the buffer shrank below what is under way");
        credit.learn(u32::MAX, 200);
        assert_eq!(credit.room(), 89, "a lie about consumption does no more than it says");
        credit.learn(1000, 200);
        assert_eq!(credit.room(), 0);
    }

    #[test]
    fn the_guest_cannot_overrun_the_buffer() {
        let mut credit = Credit::default();
        assert!(credit.receive(BUFFER));
        assert!(!credit.receive(1));
        assert!(!credit.receive(u32::MAX));
        credit.forward(BUFFER / 2 - 1);
        assert!(!credit.is_update_due());
        credit.forward(1);
        assert!(credit.is_update_due());
        assert_eq!(credit.tell(), BUFFER / 2);
        assert!(!credit.is_update_due());
        assert!(credit.receive(BUFFER / 2));
        assert!(!credit.receive(1));
    }

    proptest! {
        /// Two sides that keep the rules never get stuck and never overrun, wrapped or not.
        #[test]
        fn counters_wrap(start in any::<u32>(), steps in prop::collection::vec((0..BUFFER, 0..BUFFER), 1..200)) {
            let mut credit = Credit { received: start, forwarded: start, told: start, ..Credit::default() };
            let (mut guest_sent, mut known) = (start, start);
            let mut kept = 0_u32;
            for (wish, take) in steps {
                let room = BUFFER - guest_sent.wrapping_sub(known);
                let send = wish.min(room);
                prop_assert!(credit.receive(send));
                guest_sent = guest_sent.wrapping_add(send);
                kept += send;
                prop_assert!(kept <= BUFFER);
                let taken = take.min(kept);
                credit.forward(taken);
                kept -= taken;
                if credit.is_update_due() {
                    known = credit.tell();
                }
                prop_assert!(kept > 0 || guest_sent.wrapping_sub(known) < BUFFER, "stuck");
            }
        }

        /// To a guest that changes its buffer and tells late: never more under way than it had room
        /// for when it told, wrapped or not, and never nothing while it has room.
        #[test]
        fn no_more_is_under_way_than_the_guest_takes(
            start in any::<u32>(),
            steps in prop::collection::vec(
                (0_u32..1 << 20, 0_u32..1 << 20, 0_u32..1 << 20, any::<bool>()),
                1..200,
            ),
        ) {
            let mut credit = Credit { sent: start, guest_consumed: start, ..Credit::default() };
            let (mut under_way, mut consumed, mut told) = (0_u32, start, 0_u32);
            for (wish, take, buffer, tells) in steps {
                if tells {
                    credit.learn(buffer, consumed);
                    told = buffer;
                }
                let room = credit.room();
                let unacknowledged = credit.sent.wrapping_sub(credit.guest_consumed);
                prop_assert_eq!(room, told.saturating_sub(unacknowledged));
                let send = wish.min(room);
                credit.send(send);
                under_way += send;
                prop_assert!(send == 0 || under_way <= told);
                let taken = take.min(under_way);
                consumed = consumed.wrapping_add(taken);
                under_way -= taken;
            }
            credit.learn(1 << 20, consumed);
            prop_assert_eq!(credit.room(), (1_u32 << 20).saturating_sub(under_way), "stuck");
        }

        #[test]
        fn room_never_passes_the_guests_buffer(
            sent in any::<u32>(), consumed in any::<u32>(), buffer in any::<u32>(),
        ) {
            let mut credit = Credit { sent, ..Credit::default() };
            credit.learn(buffer, consumed);
            prop_assert!(credit.room() <= buffer);
        }
    }
}
