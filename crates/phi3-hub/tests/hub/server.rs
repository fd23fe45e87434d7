//! A hub on a loopback port: what the real one answers, and whatever a test makes of that.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: HashMap<String, String>,
}

impl Request {
    pub fn is_get_of(&self, file: &str) -> bool {
        self.method == "GET" && self.path.ends_with(&format!("/{file}"))
    }

    pub fn is_of(&self, file: &str) -> bool {
        self.path.ends_with(&format!("/{file}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

#[derive(Clone, Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Content-Length, if another than the body's.
    pub claimed: Option<u64>,
    /// After so many bytes of the body the connection ends.
    pub cut: Option<usize>,
    /// The length is not stated, and the body is sent in chunks.
    pub chunked: bool,
    /// Instead of ending, the connection stays silent at the cut.
    pub hang: bool,
}

impl Reply {
    pub fn new(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            claimed: None,
            cut: None,
            chunked: false,
            hang: false,
        }
    }

    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn without(mut self, name: &str) -> Self {
        self.headers
            .retain(|(found, _)| !found.eq_ignore_ascii_case(name));
        self
    }

    pub fn body(mut self, body: &[u8]) -> Self {
        self.body = body.to_vec();
        self
    }

    pub fn cut(mut self, after: usize) -> Self {
        self.cut = Some(after);
        self
    }
}

type Hook = Box<dyn Fn(&Request, Reply) -> Reply + Send + Sync>;

/// What a hub holds, by commit.
struct State {
    commit: String,
    files: BTreeMap<String, Vec<u8>>,
}

pub struct Hub {
    pub address: String,
    log: Arc<Mutex<Vec<Request>>>,
    state: Arc<Mutex<State>>,
}

impl Hub {
    pub fn start(files: Vec<(String, Vec<u8>)>) -> Self {
        Self::with_hook(files, |_, reply| reply)
    }

    /// `hook` sees each request with the normal answer, and decides.
    pub fn with_hook(
        files: Vec<(String, Vec<u8>)>,
        hook: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let state = State {
            commit: COMMIT.to_owned(),
            files: files.into_iter().collect(),
        };
        let state = Arc::new(Mutex::new(state));
        let hook: Arc<Hook> = Arc::new(Box::new(hook));
        let (thread_log, thread_state) = (Arc::clone(&log), Arc::clone(&state));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (log, state, hook) = (
                    Arc::clone(&thread_log),
                    Arc::clone(&thread_state),
                    Arc::clone(&hook),
                );
                // A client that goes away early is part of the tests.
                thread::spawn(move || drop(serve(stream, &log, &state, &hook)));
            }
        });
        Self {
            address,
            log,
            state,
        }
    }

    /// A new commit of the repo.
    pub fn push(&self, commit: &str, files: Vec<(String, Vec<u8>)>) {
        *self.state.lock().unwrap() = State {
            commit: commit.to_owned(),
            files: files.into_iter().collect(),
        };
    }

    pub fn requests(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    pub fn gets_of(&self, file: &str) -> Vec<Request> {
        self.requests()
            .into_iter()
            .filter(|request| request.is_get_of(file))
            .collect()
    }
}

fn serve(
    stream: TcpStream,
    log: &Mutex<Vec<Request>>,
    state: &Mutex<State>,
    hook: &Hook,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (Some(method), Some(path)) = (words.next(), words.next()) else {
        return Ok(());
    };
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let request = Request {
        method,
        path,
        headers,
    };
    log.lock().unwrap().push(request.clone());
    let normal = normal(&request, &state.lock().unwrap());
    write(stream, &request, &hook(&request, normal))
}

fn write(mut stream: TcpStream, request: &Request, reply: &Reply) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} -\r\nConnection: close\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if reply.chunked {
        head.push_str("Transfer-Encoding: chunked\r\n\r\n");
    } else {
        let length = reply.claimed.unwrap_or(reply.body.len() as u64);
        head.push_str(&format!("Content-Length: {length}\r\n\r\n"));
    }
    stream.write_all(head.as_bytes())?;
    if request.method != "HEAD" {
        let end = reply.cut.unwrap_or(reply.body.len()).min(reply.body.len());
        if reply.chunked {
            for part in reply.body[..end].chunks(50_000) {
                write!(stream, "{:x}\r\n", part.len())?;
                stream.write_all(part)?;
                stream.write_all(b"\r\n")?;
            }
            if end == reply.body.len() {
                stream.write_all(b"0\r\n\r\n")?;
            }
        } else {
            stream.write_all(&reply.body[..end])?;
        }
        stream.flush()?;
        if reply.hang {
            thread::sleep(Duration::from_secs(30));
        }
    }
    stream.flush()
}

/// What the real hub answers.
fn normal(request: &Request, state: &State) -> Reply {
    let path = request.path.split('?').next().unwrap();
    let parts: Vec<&str> = path.trim_start_matches('/').splitn(5, '/').collect();
    match parts.as_slice() {
        ["api", "models", "org", "name", rest] => match rest.strip_prefix("revision/") {
            Some(revision) if is_revision(revision, state) => {
                let siblings: Vec<_> = state
                    .files
                    .keys()
                    .map(|name| serde_json::json!({ "rfilename": name }))
                    .collect();
                let body = serde_json::json!({ "id": "org/name", "sha": state.commit, "siblings": siblings });
                Reply::new(200).body(body.to_string().as_bytes())
            }
            _ => Reply::new(404).with("X-Error-Code", "RevisionNotFound"),
        },
        ["org", "name", "resolve", revision, file] => {
            if !is_revision(revision, state) {
                return Reply::new(404).with("X-Error-Code", "RevisionNotFound");
            }
            let commit = ("X-Repo-Commit", state.commit.as_str());
            match state.files.get(*file) {
                Some(content) => {
                    content_of(request, content, &etag(file, content)).with(commit.0, commit.1)
                }
                None => Reply::new(404)
                    .with("X-Error-Code", "EntryNotFound")
                    .with(commit.0, commit.1),
            }
        }
        // Storage: other ETags, no commits.
        ["cdn", file @ ..] => match state.files.get(&file.join("/")) {
            Some(content) => content_of(request, content, "storage-etag"),
            None => Reply::new(404),
        },
        _ => Reply::new(404).with("X-Error-Code", "RepoNotFound"),
    }
}

fn is_revision(revision: &str, state: &State) -> bool {
    ["main", "v1", "refs%2Fpr%2F1", state.commit.as_str()].contains(&revision)
}

fn content_of(request: &Request, content: &[u8], etag: &str) -> Reply {
    let reply = Reply::new(200)
        .with("ETag", format!("\"{etag}\""))
        .with("Accept-Ranges", "bytes");
    let range = request
        .header("range")
        .and_then(|range| range.strip_prefix("bytes="));
    let Some(first) = range.and_then(|range| range.strip_suffix('-')) else {
        return reply.body(content);
    };
    let first: usize = first.parse().unwrap();
    if first >= content.len() {
        return Reply {
            status: 416,
            ..reply
        };
    }
    let range = format!("bytes {first}-{}/{}", content.len() - 1, content.len());
    Reply {
        status: 206,
        ..reply.with("Content-Range", range)
    }
    .body(&content[first..])
}

/// Large files have their sha256 as ETag, small ones git's hash of 40 digits.
pub fn etag(file: &str, content: &[u8]) -> String {
    let hash = sha256(content);
    if file.ends_with(".safetensors") || file.ends_with(".gguf") {
        hash
    } else {
        hash[..40].to_owned()
    }
}

pub fn sha256(content: &[u8]) -> String {
    Sha256::digest(content)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
