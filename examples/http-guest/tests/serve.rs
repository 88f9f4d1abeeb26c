//! What the guest says to its clients, without a guest.

use http_serve::limits::MAX_HEAD;
use http_serve::request::{Parsed, Request, encode, parse};

fn request(path: &str, head_only: bool, keep_alive: bool) -> Request {
    Request {
        path: path.into(),
        head_only,
        keep_alive,
    }
}

#[test]
fn requests_are_parsed_or_refused() {
    for (text, expected) in [
        ("GET / HTTP/1.1\r\n\r\n", request("", false, true)),
        ("GET /a/b HTTP/1.0\r\n\r\n", request("a/b", false, false)),
        (
            "HEAD /a%20b%25 HTTP/1.1\r\nHost: x\r\n\r\n",
            request("a b%", true, true),
        ),
        (
            "GET /x?q=%zz#f HTTP/1.1\r\nConnection: Close\r\n\r\n",
            request("x", false, false),
        ),
        (
            "GET /x HTTP/1.0\r\nconnection: foo, keep-alive\r\n\r\n",
            request("x", false, true),
        ),
        (
            "GET /%C3%BC HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
            request("ü", false, true),
        ),
    ] {
        assert_eq!(
            parse(text.as_bytes()),
            Parsed::Request(expected, text.len())
        );
        for end in 0..text.len() {
            assert_eq!(parse(&text.as_bytes()[..end]), Parsed::Partial, "{text:?}");
        }
        let more = [text, "GET"].concat();
        assert!(matches!(parse(more.as_bytes()), Parsed::Request(_, used) if used == text.len()));
    }
    for (text, status) in [
        ("\r\n\r\n", 400),
        ("GET /\r\n\r\n", 400),
        ("GET  / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1 x\r\n\r\n", 400),
        ("GET x HTTP/1.1\r\n\r\n", 400),
        ("GET /%4 HTTP/1.1\r\n\r\n", 400),
        ("GET /%zz HTTP/1.1\r\n\r\n", 400),
        ("GET /%ff HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nnothing\r\n\r\n", 400),
        ("GET / HTTP/2\r\n\r\n", 505),
        ("POST / HTTP/1.1\r\n\r\n", 405),
        ("GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\n", 413),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 413),
    ] {
        assert_eq!(parse(text.as_bytes()), Parsed::Refused(status), "{text:?}");
    }
    assert_eq!(parse(b"GET /\xff HTTP/1.1\r\n\r\n"), Parsed::Refused(400));
}

#[test]
fn heads_at_the_limit_and_one_past_it() {
    let head = |length: usize| {
        let line = "GET / HTTP/1.1\r\nx:";
        [line, &"y".repeat(length - line.len())].concat()
    };
    let whole = |length| [head(length), "\r\n\r\n".into()].concat();
    assert!(matches!(
        parse(whole(MAX_HEAD).as_bytes()),
        Parsed::Request(..)
    ));
    assert_eq!(parse(whole(MAX_HEAD + 1).as_bytes()), Parsed::Refused(431));
    assert_eq!(parse(head(MAX_HEAD).as_bytes()), Parsed::Partial);
    assert_eq!(parse(head(MAX_HEAD + 1).as_bytes()), Parsed::Refused(431));
}

#[test]
fn links_lead_back_to_what_they_name() {
    for path in ["a", "a b/c%d", "ünï/<&>\"'#?", "%41", "~x-y_z.html"] {
        let text = format!("GET /{} HTTP/1.1\r\n\r\n", encode(path));
        let expected = request(path, false, true);
        assert_eq!(
            parse(text.as_bytes()),
            Parsed::Request(expected, text.len())
        );
    }
}
