//! What a shim of an older build does not know: it refuses, or does as it always did.
#![allow(clippy::unwrap_used)]

use prost::Message;
use slipway_shim_api::frame::{self, HEADER, Header, Kind};
use slipway_shim_api::{task, ttrpc};
use slipway_shim_client::{Code, CreateContainer, Error, Launcher, Output, Shim, Stdin};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

/// Answers Task.Create as a build does that knows neither `discard:` nor options.
fn create(request: &task::CreateTaskRequest) -> ttrpc::Response {
    let refused = |message: &str| ttrpc::Response {
        status: Some(ttrpc::Status {
            code: Code::InvalidArgument as i32,
            message: message.to_owned(),
        }),
        payload: Vec::new(),
    };
    if request.bundle.is_empty() {
        return refused("the bundle \"\" is no absolute path");
    }
    if request.stdout == "discard:" {
        return refused("stdout \"discard:\" is of no known kind");
    }
    ttrpc::Response {
        status: None,
        payload: task::CreateTaskResponse { pid: 4711 }.encode_to_vec(),
    }
}

/// Serves one connection; everything it was asked.
async fn serve(listener: UnixListener) -> Vec<task::CreateTaskRequest> {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut asked = Vec::new();
    let mut header = [0; HEADER];
    while stream.read_exact(&mut header).await.is_ok() {
        let header = Header::decode(&header).unwrap();
        let mut data = vec![0; header.length as usize];
        stream.read_exact(&mut data).await.unwrap();
        let request = ttrpc::Request::decode(data.as_slice()).unwrap();
        let request = task::CreateTaskRequest::decode(request.payload.as_slice()).unwrap();
        let answer = frame::encode(header.stream, Kind::Response, &create(&request)).unwrap();
        asked.push(request);
        stream.write_all(&answer).await.unwrap();
    }
    asked
}

async fn with_older<T>(act: impl AsyncFnOnce(Shim) -> T) -> (T, Vec<task::CreateTaskRequest>) {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("shim.sock")).unwrap();
    let server = tokio::spawn(serve(listener));
    let launcher = Launcher {
        shim: "/x".into(),
        worker: "/x".into(),
    };
    let answer = act(launcher.connect(dir.path()).await.unwrap()).await;
    (answer, server.await.unwrap())
}

fn container(stdout: Output) -> CreateContainer {
    CreateContainer {
        id: "c".into(),
        bundle: "/b".into(),
        stdin: Stdin::Keep,
        stdout,
        terminal: false,
        pid_target: None,
    }
}

#[tokio::test]
async fn one_that_creates_before_it_answers_says_the_pid() {
    let log = Output::CriLog("/logs/0.log".into());
    let (pid, asked) = with_older(async |shim| shim.begin_create(container(log)).await).await;
    assert_eq!(pid.unwrap(), 4711);
    assert_eq!(asked.len(), 1);
}

#[tokio::test]
async fn output_that_it_cannot_discard_is_not_kept() {
    let (pid, asked) = with_older(async |shim| shim.create(container(Output::Discard)).await).await;
    assert_eq!(pid.unwrap(), 4711);
    let outputs: Vec<_> = asked.iter().map(|request| request.stdout.as_str()).collect();
    assert_eq!(outputs, ["discard:", ""]);
    assert!(asked.iter().all(|request| request.stdin == "keep:"));
    // Another reason is told, whichever try it is.
    let wrong = CreateContainer {
        bundle: "".into(),
        ..container(Output::Discard)
    };
    let (refused, _) = with_older(async |shim| shim.create(wrong).await).await;
    let Err(Error::Status { message, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert!(message.contains("absolute"), "{message}");
}
