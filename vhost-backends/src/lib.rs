//! vhost-backends
