//! Which processor the guest sees: the host's, without what a guest cannot have.
//!
//! Hidden: nested virtualisation (VMX, SVM), performance monitoring, debug store, SMX, turbo and
//! energy hints, processor trace. Shown: one package whose cores have one thread each, their number
//! and the APIC numbers as the machine has them; the hypervisor bit and the TSC-deadline timer.
//! Source: Intel SDM 2A "CPUID", AMD APM 3 appendix E, Linux `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const VENDOR_AMD: u32 = u32::from_le_bytes(*b"cAMD");
const VENDOR_HYGON: u32 = u32::from_le_bytes(*b"uine");

const LEAF1_ECX_HIDDEN: u32 = bit(2) | bit(5) | bit(6) | bit(7) | bit(8) | bit(15);
const LEAF1_ECX_TSC_DEADLINE: u32 = bit(24);
const LEAF1_ECX_HYPERVISOR: u32 = bit(31);
const LEAF1_EDX_HIDDEN: u32 = bit(21) | bit(22) | bit(29);
const LEAF1_EDX_HYPER_THREADING: u32 = bit(28);
const LEAF6_EAX_ARAT: u32 = bit(2);
const LEAF7_EBX_HIDDEN: u32 = bit(2) | bit(12) | bit(15) | bit(25);
const LEAF7_EDX_HIDDEN: u32 = bit(15) | bit(18) | bit(19);
const AMD1_ECX_HIDDEN: u32 = bit(2)
    | bit(3)
    | bit(10)
    | bit(12)
    | bit(13)
    | bit(15)
    | bit(23)
    | bit(24)
    | bit(26)
    | bit(27)
    | bit(28);
const AMD1_ECX_TOPOLOGY: u32 = bit(22);
const CORE_LEVEL: u32 = 2;
const THREAD_LEVEL: u32 = 1;

const fn bit(number: u32) -> u32 {
    1 << number
}

/// The leaves for vCPU `number` of `count`, made from those KVM supports.
pub fn guest_cpuid(supported: &CpuId, number: u8, count: u8) -> CpuId {
    let supported = supported.as_slice();
    let amd = supported
        .iter()
        .any(|leaf| leaf.function == 0 && matches!(leaf.ecx, VENDOR_AMD | VENDOR_HYGON));
    let mut entries: Vec<kvm_cpuid_entry2> =
        supported.iter().filter(|leaf| !matches!(leaf.function, 0xb | 0x1f)).copied().collect();
    for leaf in &mut entries {
        shape(leaf, u32::from(number), u32::from(count), amd);
    }
    let highest = supported.iter().find(|leaf| leaf.function == 0).map_or(0, |leaf| leaf.eax);
    for function in [0xb, 0x1f] {
        if highest >= function {
            entries.extend(topology(function, u32::from(number), u32::from(count)));
        }
    }
    // KVM gives at most 256 leaves (checked by its wrapper), and at most six come in for others.
    CpuId::from_entries(&entries).unwrap_or_else(|_| {
        CpuId::from_entries(&entries[..kvm_bindings::KVM_MAX_CPUID_ENTRIES])
            .unwrap_or_else(|_| unreachable!("as many leaves as KVM takes"))
    })
}

fn shape(leaf: &mut kvm_cpuid_entry2, number: u32, count: u32, amd: bool) {
    match leaf.function {
        0x1 => {
            leaf.ebx = (leaf.ebx & 0xffff) | (count << 16) | (number << 24);
            leaf.ecx &= !LEAF1_ECX_HIDDEN;
            leaf.ecx |= LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_HYPERVISOR;
            leaf.edx &= !(LEAF1_EDX_HIDDEN | LEAF1_EDX_HYPER_THREADING);
            if count > 1 {
                leaf.edx |= LEAF1_EDX_HYPER_THREADING;
            }
        }
        0x4 => {
            // Bits 5 to 7 tell the level: the first two are a core's own, the rest all cores share.
            let level = (leaf.eax >> 5) & 7;
            let kind = leaf.eax & 0x1f;
            if kind != 0 {
                let sharing = if level < 3 { 0 } else { count - 1 };
                leaf.eax = (leaf.eax & 0x3fff) | (sharing << 14) | ((count - 1) << 26);
            }
        }
        0x6 => {
            leaf.eax &= LEAF6_EAX_ARAT;
            leaf.ecx = 0;
        }
        0x7 if leaf.index == 0 => {
            leaf.ebx &= !LEAF7_EBX_HIDDEN;
            leaf.edx &= !LEAF7_EDX_HIDDEN;
        }
        // Performance monitoring, processor trace; AMD's virtualisation, sampling, monitoring.
        0xa | 0x14 | 0x23 | 0x8000_000a | 0x8000_001b | 0x8000_001c | 0x8000_0022 => {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
        }
        0x8000_0001 => {
            leaf.ecx &= !AMD1_ECX_HIDDEN;
            if amd {
                leaf.ecx |= AMD1_ECX_TOPOLOGY;
            }
        }
        0x8000_0008 if amd => leaf.ecx = (bits(count) << 12) | (count - 1),
        0x8000_001d if amd => {
            let level = (leaf.eax >> 5) & 7;
            if leaf.eax & 0x1f != 0 {
                let sharing = if level < 3 { 0 } else { count - 1 };
                leaf.eax = (leaf.eax & 0x3fff) | (sharing << 14);
            }
        }
        0x8000_001e if amd => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (number, number, 0, 0),
        _ => {}
    }
}

/// The extended topology leaves: one thread a core, all cores in one package.
fn topology(function: u32, number: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index, shift, processors, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: (kind << 8) | index,
        edx: number,
        ..Default::default()
    };
    [level(0, 0, 1, THREAD_LEVEL), level(1, bits(count), count, CORE_LEVEL), level(2, 0, 0, 0)]
}

/// How many bits tell `count` things apart.
fn bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported(vendor: u32) -> CpuId {
        let all = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let mut leaves: Vec<_> =
            [1, 4, 6, 7, 0xa, 0xb, 0x14, 0x8000_0001, 0x8000_0008, 0x8000_000a]
                .into_iter()
                .chain([0x8000_001d, 0x8000_001e, 0x4000_0001])
                .map(|function| all(function, 0))
                .collect();
        leaves.push(kvm_cpuid_entry2 { eax: 0x1f, ecx: vendor, ..Default::default() });
        CpuId::from_entries(&leaves).unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = |leaf: &&kvm_cpuid_entry2| leaf.function == function && leaf.index == index;
        *cpuid.as_slice().iter().find(found).unwrap()
    }

    #[test]
    fn hides_what_a_guest_cannot_have() {
        let cpuid = guest_cpuid(&supported(VENDOR_AMD), 0, 1);
        let one = leaf(&cpuid, 1, 0);
        assert_eq!(one.ecx & bit(5), 0, "VMX");
        assert_ne!(one.ecx & bit(31), 0, "hypervisor");
        assert_ne!(one.ecx & bit(24), 0, "TSC deadline");
        assert_eq!(one.edx & bit(28), 0, "no second thread");
        assert_eq!(leaf(&cpuid, 0x8000_0001, 0).ecx & bit(2), 0, "SVM");
        assert_eq!(leaf(&cpuid, 0x8000_000a, 0).eax, 0);
        assert_eq!(leaf(&cpuid, 0xa, 0).eax, 0);
        assert_eq!(leaf(&cpuid, 6, 0).eax, LEAF6_EAX_ARAT);
        assert_eq!(leaf(&cpuid, 0x4000_0001, 0).eax, u32::MAX, "KVM's own stay");
    }

    #[test]
    fn tells_each_its_number() {
        let supported = supported(VENDOR_AMD);
        for number in 0..6 {
            let cpuid = guest_cpuid(&supported, number, 6);
            let id = u32::from(number);
            assert_eq!(leaf(&cpuid, 1, 0).ebx >> 16, (id << 8) | 6);
            assert_ne!(leaf(&cpuid, 1, 0).edx & bit(28), 0);
            assert_eq!(leaf(&cpuid, 0xb, 0).edx, id);
            assert_eq!(leaf(&cpuid, 0xb, 1).eax, 3);
            assert_eq!(leaf(&cpuid, 0xb, 1).ebx, 6);
            assert_eq!(leaf(&cpuid, 0x1f, 2).ecx, 2);
            assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, (3 << 12) | 5);
            assert_eq!(leaf(&cpuid, 0x8000_001e, 0).eax, id);
            assert_eq!(cpuid.as_slice().iter().filter(|l| l.function == 0xb).count(), 3);
        }
    }

    #[test]
    fn leaves_amds_leaves_alone_on_intel() {
        let cpuid = guest_cpuid(&supported(u32::from_le_bytes(*b"ntel")), 0, 2);
        assert_eq!(leaf(&cpuid, 0x8000_0008, 0).ecx, u32::MAX);
        assert_eq!(leaf(&cpuid, 4, 0).eax >> 26, 1);
    }
}
