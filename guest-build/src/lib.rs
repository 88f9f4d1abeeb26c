//! guest-build
