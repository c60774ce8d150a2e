//! The cluster's own certificate authority, its certificates, and kubeconfig files that use them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cmd;

/// Keys and certificates below one directory.
pub struct Pki {
    dir: PathBuf,
}

impl Pki {
    /// Makes the authority and the key that service account tokens are signed with, where they are not there.
    ///
    /// # Errors
    /// openssl is missing or fails.
    pub fn new(dir: &Path) -> Result<Pki> {
        std::fs::create_dir_all(dir)?;
        let p = Pki { dir: dir.to_owned() };
        if !p.path("ca.crt").exists() {
            p.openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.crt -days 365 -subj /CN=slipway-cluster")?;
            p.openssl("genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out sa.key")?;
            p.openssl("pkey -in sa.key -pubout -out sa.pub")?;
        }
        Ok(p)
    }

    /// A path below its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A certificate `NAME.crt` with its key `NAME.key` for `subject` ("/O=group/CN=user"); `hosts`: its alternative names
    /// as openssl writes them ("IP:127.0.0.1"), for a server's.
    ///
    /// # Errors
    /// openssl fails.
    pub fn certificate(&self, name: &str, subject: &str, hosts: &[String]) -> Result<()> {
        let usage = if hosts.is_empty() {
            "extendedKeyUsage=clientAuth\n".to_owned()
        } else {
            format!(
                "extendedKeyUsage=serverAuth\nsubjectAltName={}\n",
                hosts.join(",")
            )
        };
        std::fs::write(self.path(&format!("{name}.ext")), usage)?;
        self.openssl(&format!(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {name}.key -out {name}.csr -subj {subject}"
        ))?;
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -out {name}.crt -extfile {name}.ext"
        ))
    }

    /// A kubeconfig file beside the certificate `name` that reaches `server` with it; its path.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn kubeconfig(&self, name: &str, server: &str) -> Result<PathBuf> {
        let path = self.path(&format!("{name}.conf"));
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: slipway\n  cluster:\n    server: {server}\n    certificate-authority: {ca}\nusers:\n- name: {name}\n  user:\n    client-certificate: {crt}\n    client-key: {key}\ncontexts:\n- name: slipway\n  context: {{cluster: slipway, user: {name}}}\ncurrent-context: slipway\n",
            ca = self.path("ca.crt").display(),
            crt = self.path(&format!("{name}.crt")).display(),
            key = self.path(&format!("{name}.key")).display(),
        );
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    fn openssl(&self, line: &str) -> Result<()> {
        let mut c = cmd::command("openssl", line.split(' '));
        c.current_dir(&self.dir);
        cmd::run(&mut c, Duration::from_secs(30))?
            .ok()
            .with_context(|| format!("openssl {line}"))?;
        Ok(())
    }
}
