//! A node for one test: a fake driver, the agent's folders, and the agent.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use slipway_fake_gpu::{Driver, FOLDER, Topology};

/// Device nodes have to be made: says so loudly when that cannot be.
pub fn root() -> bool {
    !skipped(
        !rustix::process::geteuid().is_root(),
        "root, to make device nodes",
    )
}

/// Whether a test lacks what it needs: says so loudly, past libtest, which keeps what `eprintln!` prints of tests that pass.
pub fn skipped(lacks: bool, needs: &str) -> bool {
    if lacks {
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("this test");
        let text = format!("\n*** SKIPPED: {test} needs {needs} ***\n\n");
        std::io::stderr().write_all(text.as_bytes()).unwrap();
    }
    lacks
}

pub struct Node {
    pub dir: tempfile::TempDir,
    pub driver: Driver,
    /// What is started as the agent.
    pub program: PathBuf,
    agent: Option<Child>,
}

impl Node {
    /// With the topology of this name; `more` is the end of the configuration file.
    pub fn new(topology: &str, more: &str) -> Node {
        let topology = Topology::named(topology).unwrap();
        Node::of(&topology, more)
    }

    pub fn of(topology: &Topology, more: &str) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let driver = Driver::lay_out(&dir.path().join("driver"), topology).unwrap();
        let node = Node {
            dir,
            driver,
            program: env!("CARGO_BIN_EXE_slipway-agent").into(),
            agent: None,
        };
        std::fs::create_dir(node.kubelet()).unwrap();
        let path = |p: &PathBuf| format!("{:?}", p.display().to_string());
        let config = format!(
            "[driver]\nroot = {}\ndev = {}\ndeadline_ms = 1500\n[paths]\nproc = {}\nsys = {}\nstate = {}\nkubelet = {}\ncdi = {}\npod_resources = {}\npods = {}\nkmsg = {}\n[http]\nlisten = \"127.0.0.1:0\"\n{more}",
            path(&node.driver.root()),
            path(&node.driver.dev()),
            path(&node.driver.proc()),
            path(&node.driver.sys()),
            path(&node.dir.path().join("state")),
            path(&node.kubelet()),
            path(&node.cdi()),
            path(&node.pod_resources()),
            path(&node.pods()),
            path(&node.dir.path().join("kmsg")),
        );
        std::fs::write(node.config(), config).unwrap();
        node
    }

    pub fn config(&self) -> PathBuf {
        self.dir.path().join("agent.toml")
    }

    /// kubelet's folder.
    pub fn kubelet(&self) -> PathBuf {
        self.dir.path().join("kubelet")
    }

    /// kubelet's socket for who has what.
    pub fn pod_resources(&self) -> PathBuf {
        self.dir.path().join("resources.sock")
    }

    /// kubelet's socket for its pods.
    pub fn pods(&self) -> PathBuf {
        self.dir.path().join("pods.sock")
    }

    /// The kernel's log, to be written to; before the agent is started.
    pub fn kernel_log(&self) -> std::fs::File {
        let path = self.dir.path().join("kmsg");
        let mode = rustix::fs::Mode::RWXU;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        // Open in both directions, it has no end while this is open.
        let both = std::fs::OpenOptions::new().read(true).write(true).open(path);
        both.unwrap()
    }

    /// The CDI folder.
    pub fn cdi(&self) -> PathBuf {
        self.dir.path().join("cdi")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut c = Command::new(&self.program);
        c.arg("--config")
            .arg(self.config())
            .args(args)
            .env(FOLDER, self.driver.nvml())
            .stdin(Stdio::null());
        c
    }

    /// Runs a verb to its end.
    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What a verb prints; it must succeed.
    pub fn ok(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).unwrap()
    }

    /// Starts the agent as a daemon; its log goes to `log`.
    pub fn start(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .unwrap();
        self.agent = Some(self.command(&[]).stderr(log).spawn().unwrap());
    }

    /// Kills it, as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().unwrap();
            agent.wait().unwrap();
        }
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.agent
            .as_mut()
            .is_some_and(|a| a.try_wait().unwrap().is_none())
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// A process that the agent has for NVML.
    fn child(&self) -> Option<String> {
        let library = self.driver.root().display().to_string();
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let mut pids = processes.filter_map(|e| e.file_name().into_string().ok());
        pids.find(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("nvml-child") && line.contains(&library)
        })
    }

    /// Waits for something; its log is told when it does not come.
    pub async fn wait(&self, what: &str, mut there: impl FnMut() -> bool) -> Duration {
        let began = Instant::now();
        while !there() {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "{what} did not come:\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        began.elapsed()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the agent's log\n{}", self.log());
            return;
        }
        // However the agent ended, and whatever hangs.
        let began = Instant::now();
        while let Some(pid) = self.child() {
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "process {pid} of the agent's is left"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
