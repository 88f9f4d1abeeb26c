//! The files of the disk, small ones in memory once they were asked for.

use crate::limits::{CACHED_BYTES, CACHED_FILE, MAX_LIST};
use crate::request::encode;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use quickstart_fs::disk::Disk;
use quickstart_fs::files::{Files, OpenFile};
use quickstart_fs::walk::WalkError;

/// What there is to serve.
#[derive(Debug)]
pub struct Site<D: Disk> {
    pub(crate) files: Files<D>,
    cache: BTreeMap<String, Arc<[u8]>>,
    cached: usize,
    list: Arc<[u8]>,
}

/// What a path leads to.
#[derive(Debug)]
pub enum Found {
    /// Bytes in memory, and their media type.
    Bytes(Arc<[u8]>, &'static str),
    /// A file to be read.
    File(OpenFile, &'static str),
    /// Nothing.
    Nothing,
}

impl<D: Disk> Site<D> {
    /// All files of a volume.
    pub fn new(files: Files<D>) -> Self {
        let list = list(&files);
        Site {
            files,
            cache: BTreeMap::new(),
            cached: 0,
            list,
        }
    }

    /// Files, and the bytes of all of them.
    pub fn totals(&self) -> (u64, u64) {
        let add = |(files, bytes), (_, length): (&str, u32)| (files + 1, bytes + u64::from(length));
        self.files.iter().fold((0, 0), add)
    }

    /// What this path leads to; the list of files for the empty one.
    ///
    /// # Errors
    ///
    /// When the disk fails.
    pub fn find(&mut self, path: &str) -> Result<Found, WalkError<D::Error>> {
        if path.is_empty() {
            return Ok(Found::Bytes(Arc::clone(&self.list), HTML));
        }
        let kind = media_type(path);
        if let Some(bytes) = self.cache.get(path) {
            return Ok(Found::Bytes(Arc::clone(bytes), kind));
        }
        let Some(mut file) = self.files.open(path)? else {
            return Ok(Found::Nothing);
        };
        let length = file.left() as usize;
        if length > CACHED_FILE || self.cached + length > CACHED_BYTES {
            return Ok(Found::File(file, kind));
        }
        let mut bytes = vec![0; length];
        let mut done = 0;
        let outcome = loop {
            match self.files.read(&mut file, &mut bytes[done..]) {
                Ok(0) => break Ok(()),
                Ok(count) => done += count,
                Err(error) => break Err(error),
            }
        };
        self.files.close(file);
        outcome?;
        let bytes: Arc<[u8]> = bytes.into();
        self.cached += length;
        self.cache.insert(path.into(), Arc::clone(&bytes));
        Ok(Found::Bytes(bytes, kind))
    }
}

const HTML: &str = "text/html; charset=utf-8";

fn list<D: Disk>(files: &Files<D>) -> Arc<[u8]> {
    let mut page = String::from(
        "<!doctype html><html lang=en><meta charset=utf-8><title>Paravane</title>\n\
         <h1>Served by a guest</h1>\n<ul>\n",
    );
    let mut left_out = 0u64;
    for (path, length) in files.iter() {
        if page.len() > MAX_LIST {
            left_out += 1;
            continue;
        }
        let name = path
            .replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;");
        let link = encode(path);
        page.push_str(&alloc::format!(
            "<li><a href=\"/{link}\">{name}</a> {length} bytes\n"
        ));
    }
    page.push_str("</ul>\n");
    if left_out > 0 {
        page.push_str(&alloc::format!("<p>{left_out} more are not listed\n"));
    }
    page.into_bytes().into()
}

fn media_type(path: &str) -> &'static str {
    let extension = path.rsplit_once('.').map_or("", |(_, extension)| extension);
    const KNOWN: [(&str, &str); 12] = [
        ("html", HTML),
        ("md", "text/plain; charset=utf-8"),
        ("txt", "text/plain; charset=utf-8"),
        ("rs", "text/plain; charset=utf-8"),
        ("toml", "text/plain; charset=utf-8"),
        ("css", "text/css"),
        ("js", "text/javascript"),
        ("json", "application/json"),
        ("png", "image/png"),
        ("jpg", "image/jpeg"),
        ("svg", "image/svg+xml"),
        ("pdf", "application/pdf"),
    ];
    let known = KNOWN
        .iter()
        .find(|(known, _)| extension.eq_ignore_ascii_case(known));
    known.map_or("application/octet-stream", |(_, kind)| kind)
}
