/// Where the child finds the list.
const LIST_FD: usize = 3;

/// Most mappings.
const MAX_MAPS: usize = 32;

/// One mapping of the child.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Map {
    at: u64,
    len: u64,
    offset: u64,
    fd: u32,
    prot: u32,
}

/// What the child is to map; one page.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct List {
    /// 0, then 1 once everything is mapped, then something else to end.
    ready: u32,
    count: u32,
    maps: [Map; MAX_MAPS],
}
