//! Sets `cfg(loom)` for this crate alone: the others, and their dependencies, stay as they are.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(loom)");
    println!("cargo::rustc-cfg=loom");
    println!("cargo::rerun-if-changed=build.rs");
}
