//! An S3 server inside a test, with faults on demand. The objects lie in a folder, under the names of their keys.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use hyper::{Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use tempfile::TempDir;
use tokio::{net::TcpListener, runtime::Runtime};

const BUCKET: &str = "softserve";
const KEY: &str = "test-key";
const SECRET: &str = "test-secret";

/// What the server does instead of answering.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// It answers with this status.
    Status(u16),
    /// It answers after this time.
    Slow(Duration),
    /// It takes requests and never answers.
    Silent,
    /// It closes each connection without an answer.
    Stopped,
}

/// A server with one empty bucket. It ends when it is dropped.
pub struct S3 {
    address: SocketAddr,
    folder: TempDir,
    fault: Arc<Mutex<Option<Fault>>>,
    _runtime: Runtime,
}

impl S3 {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(BUCKET)).unwrap();
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(folder.path()).unwrap());
        builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let s3 = builder.build();
        let fault = Arc::new(Mutex::new(None));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let faults = Arc::clone(&fault);
        // The server checks a condition and then writes; S3 does both at once.
        let writing = Arc::new(tokio::sync::Mutex::new(()));
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (s3, faults, writing) = (s3.clone(), Arc::clone(&faults), Arc::clone(&writing));
                let service = service_fn(move |request: Request<Incoming>| {
                    let (s3, writing) = (s3.clone(), Arc::clone(&writing));
                    let fault = *faults.lock().unwrap();
                    async move {
                        match fault {
                            Some(Fault::Status(status)) => return Ok(refusal(status)),
                            Some(Fault::Slow(time)) => tokio::time::sleep(time).await,
                            Some(Fault::Silent) => std::future::pending().await,
                            Some(Fault::Stopped) => return Err("stopped"),
                            None => {}
                        }
                        let is_write = request.method() != hyper::Method::GET;
                        let _one = if is_write { Some(writing.lock().await) } else { None };
                        let answer = s3.call(request.map(s3s::Body::from)).await;
                        Ok(answer.unwrap_or_else(|_| refusal(500)))
                    }
                });
                let http = hyper::server::conn::http1::Builder::new();
                tokio::spawn(http.serve_connection(TokioIo::new(socket), service));
            }
        });
        Self { address, folder, fault, _runtime: runtime }
    }

    /// Has the server answer otherwise, or again as it should.
    pub fn set(&self, fault: Option<Fault>) {
        *self.fault.lock().unwrap() = fault;
    }

    /// The folder in which the objects of a prefix lie.
    pub fn folder(&self, prefix: &str) -> PathBuf {
        self.folder.path().join(BUCKET).join(prefix)
    }

    /// The address of a prefix, as `--prompts` takes it.
    pub fn prompts(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// Has a program find the server, as it would find Amazon's.
    pub fn reach(&self, command: &mut Command) {
        command.env("AWS_ENDPOINT_URL", format!("http://{}", self.address));
        command.env("AWS_ACCESS_KEY_ID", KEY).env("AWS_SECRET_ACCESS_KEY", SECRET).env("AWS_REGION", "us-east-1");
    }
}

fn refusal(status: u16) -> Response<s3s::Body> {
    let code = if status == 403 { "AccessDenied" } else { "InternalError" };
    let body =
        format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>A fault of the test</Message></Error>");
    let mut answer = Response::new(s3s::Body::from(body));
    *answer.status_mut() = StatusCode::from_u16(status).unwrap();
    answer
}
