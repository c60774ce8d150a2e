//! Who we are is told to a place's own origin only, whatever URL a registry makes up.

use super::client::{Access, Registry, Session};
use super::transport::Request;
use super::{Credentials, RegistryConfig};
use crate::reference::Reference;
use reqwest::Method;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use url::Url;

/// The head of the one request that comes.
async fn heard(listener: TcpListener) -> String {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut head = vec![0; 8192];
    let read = stream.read(&mut head).await.unwrap();
    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    stream.write_all(answer).await.unwrap();
    String::from_utf8_lossy(&head[..read]).to_ascii_lowercase()
}

#[tokio::test]
async fn plain_http_of_the_same_host_and_port_gets_nothing_that_is_meant_for_https() {
    for (server, meant) in [("https", false), ("http", true)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let certs = tempfile::tempdir().unwrap();
        let dir = certs.path().join("hub.test");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(
            dir.join("hosts.toml"),
            format!("server = \"{server}://{host}\"\n"),
        )
        .unwrap();
        let config = RegistryConfig {
            certs_dir: Some(certs.path().to_owned()),
            ..RegistryConfig::default()
        };
        let reference = Reference::parse("hub.test/to:v1").unwrap();
        let token = Some(Credentials::Bearer {
            token: "t0ken".to_owned(),
        });
        let registry = Registry::new(config);
        let session = Session::open(&registry, &reference, token, Access::Push, Arc::new(|_| ()))
            .await
            .unwrap();
        let places = session.places(|_| true);
        let heard = tokio::spawn(heard(listener));
        let url = Url::parse(&format!("http://{host}/v2/to/blobs/uploads/1")).unwrap();
        let request = Request::new(Method::GET, url);
        session
            .call(places[0], &request, &session.scopes())
            .await
            .unwrap();
        assert_eq!(heard.await.unwrap().contains("authorization"), meant, "{server}");
    }
}
