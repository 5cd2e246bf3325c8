//! The agent without a guest: PID 1 of a PID namespace, its host's ports UNIX sockets in a
//! directory, busybox as the containers' root. Needs root and cgroup v2's file system.

mod filter;
mod harness;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use harness::{Agent, Ran, skip};
use husk_agent_protocols::agent::MemoryVolume;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use ttrpc::Code;

/// Runs `script` in a shell in a container of its own.
async fn shell(agent: &Agent, script: &str, change: impl FnOnce(&mut Value)) -> Result<Ran> {
    agent
        .run(|spec| {
            spec["process"]["args"] = json!(["sh", "-c", script]);
            change(spec);
        })
        .await
}

macro_rules! component {
    ($(#[$doc:meta])* async fn $name:ident($agent:ident: &Agent) $body:block) => {
        $(#[$doc])*
        #[test]
        fn $name() -> Result<()> {
            if skip() {
                return Ok(());
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let agent = Agent::start().await?;
                {
                    let $agent = &agent;
                    $body
                }
                agent.end().await
            })
        }
    };
}

component! {
    async fn exit_status_and_streams(agent: &Agent) {
        let ran = shell(agent, "echo out; echo err >&2; exit 7", |_| {}).await?;
        assert_eq!((ran.output(), ran.error(), ran.status), ("out\n", "err\n", 7));
        assert_eq!((ran.output_bytes, ran.error_bytes), (4, 4));
        let container = agent.create("signals", |s| s["process"]["args"] = json!(["sleep", "50"])).await?;
        agent.start_container("signals").await?;
        agent.signal("signals", "", 9, false).await?;
        assert_eq!(agent.finish(container).await?.status, 137);
    }
}

component! {
    async fn standard_input_is_fed_and_closed(agent: &Agent) {
        let mut container = agent.create("cat", |s| s["process"]["args"] = json!(["cat"])).await?;
        agent.start_container("cat").await?;
        let fed: Vec<u8> = (0..3 << 20).map(|n: u32| n.to_le_bytes()[1]).collect();
        container.feed(&fed).await?;
        container.close();
        let ran = agent.finish(container).await?;
        assert!(ran.output == fed);
        assert_eq!((ran.status, ran.output_bytes), (0, 3 << 20));
        // Without an end from the host, CloseStdin is one.
        let mut container = agent.create("wc", |s| s["process"]["args"] = json!(["wc", "-c"])).await?;
        agent.start_container("wc").await?;
        container.feed(b"12345").await?;
        agent.close_input("wc", "").await?;
        assert_eq!(agent.finish(container).await?.output(), "5\n");
    }
}

component! {
    async fn output_is_complete_and_counted(agent: &Agent) {
        let ran = shell(agent, "head -c 20000000 /dev/zero; echo end", |_| {}).await?;
        assert_eq!(ran.output.len(), 20_000_004);
        assert_eq!(ran.output_bytes, 20_000_004);
        assert!(ran.output.ends_with(b"end\n"));
    }
}

component! {
    async fn identity_and_limits(agent: &Agent) {
        let script = "id -u; id -g; id -G; umask; pwd; hostname; ulimit -n; \
            grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status; cat /proc/self/oom_score_adj; \
            grep SigBlk /proc/self/status; grep SigIgn /proc/self/status; grep ^0:: /proc/self/cgroup; echo $$";
        let ran = shell(agent, script, |s| {
            s["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 0o27});
            s["process"]["cwd"] = json!("/made/here");
            s["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "hard": 512, "soft": 256}]);
            s["process"]["oomScoreAdj"] = json!(123);
            s["process"]["capabilities"]["ambient"] = json!(["CAP_KILL"]);
            s["process"]["capabilities"]["inheritable"] = json!(["CAP_KILL"]);
        }).await?;
        let expected = "1000\n1001\n1001 5 7\n0027\n/made/here\nbox\n256\n\
            CapInh:\t0000000000000020\nCapPrm:\t0000000000000020\nCapEff:\t0000000000000020\n\
            CapBnd:\t0000000000000021\nCapAmb:\t0000000000000020\nNoNewPrivs:\t1\nSeccomp:\t2\n123\n\
            SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n0::/\n1\n";
        assert_eq!(ran.output(), expected, "{}", ran.error());
    }
}

component! {
    async fn arguments_and_environment_arrive(agent: &Agent) {
        let long = "x".repeat(100 << 10);
        let ran = agent.run(|s| {
            s["process"]["args"] = json!(["sh", "-c", "printf '<%s>' \"$@\"; echo ${#LONG}; env | cut -c1-9", "0", "a b", "c\nd", ""]);
            s["process"]["env"] = json!(["B=2", "PATH=/bin", format!("LONG={long}"), "A=1", "B=3"]);
        }).await?;
        let end = ran.output().split_once("102400\n").map(|(_, end)| end.to_owned());
        assert!(ran.output().starts_with("<a b><c\nd><>102400\n"), "{}", ran.error());
        let variables = end.unwrap_or_default();
        for variable in ["B=3\n", "PATH=/bin\n", "A=1\n", "HOME=/\n"] {
            assert!(variables.contains(variable), "{variables}");
        }
        assert!(!variables.contains("B=2"));
    }
}

component! {
    async fn mounts_are_as_asked(agent: &Agent) {
        std::fs::create_dir(agent.path("bound"))?;
        std::fs::write(agent.path("bound/file"), "content")?;
        let script = "cat /bound/file /one; touch /bound/new 2>&1; echo more >> /one; touch /root-file 2>&1; \
            ls /dev | tr '\\n' ' '; cat /proc/kcore | wc -c; echo x 2>&1 > /proc/sys/kernel/domainname; \
            grep -E ' (/tmp|/dev/mqueue|/sys/fs/cgroup|/dev/shm) ' /proc/mounts | cut -d' ' -f2,3; \
            ls /sys/fs/cgroup/cgroup.procs; ls /sys/firmware | wc -w; ifconfig lo | grep -c UP";
        let bound = agent.path("bound").display().to_string();
        let ran = shell(agent, script, |s| {
            s["root"]["readonly"] = json!(true);
            let mounts = s["mounts"].as_array_mut().expect("mounts");
            mounts.push(json!({"destination": "/bound", "source": bound, "type": "bind", "options": ["rbind", "ro"]}));
            mounts.push(json!({"destination": "/one", "source": format!("{bound}/file"), "options": ["bind", "rw"]}));
            mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k", "mode=1777", "nosuid"]}));
        }).await?;
        let output = ran.output();
        assert!(output.starts_with("contentcontenttouch: /bound/new: Read-only file system\ntouch: /root-file: Read-only file system\n"), "{output}{}", ran.error());
        let listed = output.lines().nth(2).unwrap_or_default();
        for name in ["fd", "full", "mqueue", "null", "ptmx", "pts", "shm", "stdout", "tty", "zero"] {
            assert!(listed.split(' ').any(|l| l == name), "{name}: {output}");
        }
        assert!(output.contains("/tmp tmpfs\n") && output.contains("/sys/fs/cgroup cgroup2\n"), "{output}");
        assert!(output.ends_with("/sys/fs/cgroup/cgroup.procs\n0\n1\n"), "{output}");
        assert_eq!(std::fs::read_to_string(agent.path("bound/file"))?, "contentmore\n");
    }
}

component! {
    async fn memory_is_there_by_its_name_and_in_parts(agent: &Agent) {
        let whole = MemoryVolume {
            name: "0".to_owned(), mode: 0o2770, gid: 77, size: 1 << 20, files: 100,
            ..MemoryVolume::default()
        };
        agent.make_memory_volume(&whole).await?;
        let memory = agent.guest_path("/run/husk/memory/0");
        let about = |path: &Path| fs::metadata(path).map(|m| (m.mode() & 0o7777, m.uid(), m.gid()));
        assert_eq!(about(&memory)?, (0o2770, 0, 77));
        fs::write(memory.join("kept"), "kept")?;
        // Asked for again, it is what it was.
        agent.make_memory_volume(&whole).await?;
        assert_eq!(fs::read_to_string(memory.join("kept"))?, "kept");

        let part = |name: &str, folder: &str| MemoryVolume {
            name: name.to_owned(), volume: "0".to_owned(), folder: folder.to_owned(),
            mode: 0o1750, uid: 5, gid: 6, ..MemoryVolume::default()
        };
        agent.make_memory_volume(&part("0-0", "/a/b")).await?;
        assert_eq!(about(&memory.join("a/b"))?, (0o1750, 5, 6));
        let mounted = agent.guest_path("/run/husk/memory/0-0");
        fs::write(mounted.join("file"), "part")?;
        assert_eq!(fs::read_to_string(memory.join("a/b/file"))?, "part");

        // Containers write there: no link of theirs decides what another mounts.
        symlink("/run", memory.join("link"))?;
        for (name, folder) in [("0-1", "/link"), ("0-2", "/link/husk"), ("0-3", "/../x")] {
            agent.make_memory_volume(&part(name, folder)).await.expect_err(folder);
            assert!(!agent.guest_path("/run/husk/memory").join(name).exists(), "{folder}");
        }
        let script = "cat /cache/kept; df -k /cache | awk 'NR == 2 { print $2 }'";
        let ran = shell(agent, script, |s| {
            let mounts = s["mounts"].as_array_mut().expect("mounts");
            mounts.push(json!({"destination": "/cache", "source": "/run/husk/memory/0", "options": ["rbind"]}));
        }).await?;
        assert_eq!(ran.output(), "kept1024\n", "{}", ran.error());
    }
}

component! {
    async fn devices_are_the_usual_ones(agent: &Agent) {
        let script = "for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; \
            echo x > /dev/null && head -c 3 /dev/zero | wc -c; mknod /tmp/mem c 1 1; cat /tmp/mem 2>&1 | head -c 60; \
            stat -c '%a %t %T' /dev/null";
        let ran = shell(agent, script, |s| {
            for set in ["bounding", "effective", "permitted"] {
                s["process"]["capabilities"][set] = json!(["CAP_MKNOD", "CAP_SYS_RAWIO", "CAP_DAC_OVERRIDE"]);
            }
        }).await?;
        assert_eq!(ran.output(), "3\ncat: can't open '/tmp/mem': Operation not permitted\n666 1 3\n", "{}", ran.error());
    }
}

component! {
    async fn limits_hold_and_are_told(agent: &Agent) {
        let controllers = std::fs::read_to_string(agent.guest_path("/sys/fs/cgroup/cgroup.controllers"))?;
        if !["cpu", "memory", "pids"].iter().all(|c| controllers.split_whitespace().any(|k| k == *c)) {
            husk_skip::skipped("the cgroup v2 here has no controllers");
        } else {
        let limits = json!({"memory": {"limit": 16 << 20}, "pids": {"limit": 50}, "cpu": {"quota": 50000, "period": 100_000}});
        let ran = shell(agent, "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max", |s| {
            s["linux"]["resources"] = limits.clone();
        }).await?;
        assert_eq!((ran.output(), ran.out_of_memory), ("16777216\n50\n50000 100000\n", 0));
        let ran = agent.run(|s| {
            s["process"]["args"] = json!(["tail", "-c", "100000000", "/dev/zero"]);
            s["linux"]["resources"] = limits.clone();
        }).await?;
        assert_eq!((ran.status, ran.out_of_memory), (137, 1));
        }
    }
}

component! {
    async fn commands_that_cannot_be_are_refused_as_by_runc(agent: &Agent) {
        std::fs::write(agent.path("rootfs/plain"), "text")?;
        for (command, text) in [
            ("nosuch", "exec: \"nosuch\": executable file not found in $PATH"),
            ("/no/such", "exec: \"/no/such\": stat /no/such: no such file or directory"),
            ("/plain", "exec: \"/plain\": permission denied"),
        ] {
            let refused = agent.run(|s| s["process"]["args"] = json!([command])).await;
            let (code, message) = harness::refusal(refused);
            assert_eq!(code, Code::UNKNOWN);
            assert_eq!(message, format!("unable to start container process: {text}"));
        }
    }
}

component! {
    /// What it would write into a guest's sysfs: nobody's processors are taken off line here.
    async fn a_changing_machine_is_followed(agent: &Agent) {
        let code = |result: Result<u32>| harness::refusal(result).0;
        assert_eq!(code(agent.set_processors(2).await), Code::INTERNAL);
        let sys = agent.path("sys");
        let write = |file: &str, text: &str| {
            let path = sys.join(file);
            fs::create_dir_all(path.parent().context("a folder")?)?;
            Ok::<_, anyhow::Error>(fs::write(path, text)?)
        };
        let read = |file: &str| fs::read_to_string(sys.join(file));
        write("devices/system/cpu/present", "0-1\n")?;
        write("devices/system/cpu/online", "0\n")?;
        write("devices/system/cpu/cpu1/online", "0\n")?;
        assert_eq!(agent.set_processors(2).await?, 1);
        assert_eq!(read("devices/system/cpu/cpu1/online")?, "1");
        assert_eq!(code(agent.set_processors(0).await), Code::INVALID_ARGUMENT);
        assert_eq!(code(agent.set_processors(3).await), Code::FAILED_PRECONDITION);
        write("module/memory_hotplug/parameters/online_policy", "contig-zones")?;
        write("bus/pci/rescan", "")?;
        agent.look_for_devices().await?;
        assert_eq!(read("bus/pci/rescan")?, "1");
    }
}

component! {
    async fn a_port_of_the_loopback_device_is_forwarded(agent: &Agent) {
        let line = "while :; do echo served | busybox nc -l -p 8080; done";
        let busybox = fs::read("/bin/busybox")?;
        let held = agent.begin_shell("serving", &busybox, line, false).await?;
        let began = Instant::now();
        let mut stream = loop {
            match agent.forward_port(8080).await {
                Ok(stream) => break stream,
                Err(error) => assert_eq!(harness::refusal::<()>(Err(error)).0, Code::NOT_FOUND),
            }
            assert!(began.elapsed().as_secs() < 30, "nobody listens");
        };
        let mut served = String::new();
        stream.read_to_string(&mut served).await?;
        assert_eq!(served, "served\n");
        let code = |result: Result<_>| harness::refusal(result).0;
        assert_eq!(code(agent.forward_port(1).await), Code::NOT_FOUND);
        assert_eq!(code(agent.forward_port(1 << 16).await), Code::INVALID_ARGUMENT);
        agent.signal("", "serving", 9, false).await?;
        agent.finish(held).await?;
    }
}

component! {
    async fn wrong_calls_get_their_codes(agent: &Agent) {
        let code = |result: Result<Ran>| harness::refusal(result).0;
        assert_eq!(code(agent.run(|s| s["process"]["args"] = json!([])).await), Code::INVALID_ARGUMENT);
        let held = agent.create("held", |s| s["process"]["args"] = json!(["sleep", "50"])).await?;
        assert_eq!(harness::refusal(agent.create("held", |_| {}).await).0, Code::ALREADY_EXISTS);
        assert_eq!(harness::refusal(agent.start_container("other").await).0, Code::NOT_FOUND);
        agent.start_container("held").await?;
        assert_eq!(harness::refusal(agent.start_container("held").await).0, Code::FAILED_PRECONDITION);
        assert_eq!(harness::refusal(agent.delete("held").await).0, Code::FAILED_PRECONDITION);
        assert_eq!(harness::refusal(agent.signal("held", "", 99, false).await).0, Code::INVALID_ARGUMENT);
        agent.signal("held", "", 9, true).await?;
        agent.wait("held", "").await?;
        assert_eq!(harness::refusal(agent.signal("held", "", 9, false).await).0, Code::NOT_FOUND);
        drop(held);
        agent.delete("held").await?;
        // One that was never started goes too.
        drop(agent.create("held", |_| {}).await?);
        agent.delete("held").await?;
        assert_eq!(harness::refusal(agent.delete("held").await).0, Code::NOT_FOUND);
    }
}

component! {
    async fn exec_joins_the_container(agent: &Agent) {
        let held = agent.create("box", |s| s["process"]["args"] = json!(["sleep", "50"])).await?;
        agent.start_container("box").await?;
        let script = "echo $0; id -u; pwd; hostname; grep -E '^(CapEff|CapBnd|NoNew|Seccomp:)' /proc/self/status; cat /proc/1/cmdline | tr '\\0' ' '; grep ^0:: /proc/self/cgroup; exit 3";
        let ran = agent.exec("box", "one", |p| p["args"] = json!(["sh", "-c", script, "name"])).await?;
        let expected = "name\n0\n/\nbox\nCapEff:\t0000000000000021\nCapBnd:\t0000000000000021\n\
            NoNewPrivs:\t1\nSeccomp:\t2\nsleep 50 0::/\n";
        assert_eq!((ran.output(), ran.status), (expected, 3), "{}", ran.error());
        // Without no-new-privileges the profile is loaded all the same, and a user can be another.
        let ran = agent.exec("box", "two", |p| {
            p["args"] = json!(["sh", "-c", "id -u; grep -E '^(CapEff|NoNew|Seccomp:)' /proc/self/status; ln -s a /tmp/denied 2>&1"]);
            p["noNewPrivileges"] = json!(false);
            p["user"] = json!({"uid": 9, "gid": 9});
        }).await?;
        assert_eq!(ran.output(), "9\nCapEff:\t0000000000000000\nNoNewPrivs:\t0\nSeccomp:\t2\nln: /tmp/denied: Function not implemented\n");
        let (code, text) = harness::refusal(agent.exec("box", "three", |p| p["args"] = json!(["nosuch"])).await);
        assert_eq!(code, Code::UNKNOWN);
        assert_eq!(text, "unable to start container process: exec: \"nosuch\": executable file not found in $PATH");
        let (_, text) = harness::refusal(agent.run(|s| s["process"]["cwd"] = json!("/one/x")).await);
        assert!(text.ends_with("mkdir /one/x: not a directory"), "{text}");
        // What libcontainer tells of it is the step alone.
        let missing = json!({"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]});
        let add = |s: &mut Value| s["mounts"].as_array_mut().expect("mounts").push(missing);
        let (_, text) = harness::refusal(agent.run(add).await);
        assert!(text.contains("failed to prepare rootfs: ") && text.contains("/no/such"), "{text}");
        let (_, text) = harness::refusal(agent.exec("box", "four", |p| p["cwd"] = json!("/nosuch")).await);
        assert!(text.ends_with("chdir to cwd (\"/nosuch\") set in config.json failed: no such file or directory"), "{text}");
        // While it runs it is listed under its name.
        let mut running = agent.begin_exec("box", "five", |p| p["args"] = json!(["cat"])).await?;
        let listed = agent.list("box").await?;
        assert_eq!(listed.len(), 2);
        assert!(listed.iter().any(|(_, name)| name == "five"));
        assert_eq!(harness::refusal(agent.delete_exec("box", "five").await).0, Code::FAILED_PRECONDITION);
        running.feed(b"fed").await?;
        running.close();
        assert_eq!(agent.finish(running).await?.output(), "fed");
        agent.signal("box", "", 15, true).await?;
        agent.signal("box", "", 9, false).await?;
        assert_eq!(agent.finish(held).await?.status, 137);
    }
}

component! {
    async fn a_container_has_started_when_its_command_is_executed(agent: &Agent) {
        for number in 0..10 {
            let id = format!("c{number}");
            let held = agent.create(&id, |s| s["process"]["args"] = json!(["sleep", "50"])).await?;
            let pid = agent.list(&id).await?[0].0;
            agent.start_container(&id).await?;
            let command = fs::read_to_string(agent.guest_path(&format!("/proc/{pid}/cmdline")))?;
            assert_eq!(command, "sleep\x0050\0");
            agent.signal(&id, "", 9, false).await?;
            assert_eq!(agent.finish(held).await?.status, 137);
        }
        // As runc's init does it says why on its standard error, too.
        let plain = agent.path("rootfs/plain");
        fs::write(&plain, "\x7fnothing")?;
        fs::set_permissions(&plain, fs::Permissions::from_mode(0o755))?;
        let held = agent.create("bad", |s| s["process"]["args"] = json!(["/plain"])).await?;
        let (code, text) = harness::refusal(agent.start_container("bad").await);
        assert_eq!(code, Code::UNKNOWN);
        assert_eq!(text, "unable to start container process: exec /plain: exec format error");
        let ran = agent.finish(held).await?;
        assert_eq!((ran.status, ran.error()), (1, "exec /plain: exec format error\n"));
    }
}

component! {
    /// Whenever the call ends, and whatever the process has come to by then.
    async fn an_exec_that_is_given_up_leaves_no_process(agent: &Agent) {
        let held = agent.create("box", |s| s["process"]["args"] = json!(["sleep", "50"])).await?;
        agent.start_container("box").await?;
        let mut given_up = 0;
        for limit in 1..40 {
            let exec = format!("e{limit}");
            let answered = agent.give_up_exec("box", &exec, Duration::from_millis(limit)).await?;
            given_up += u32::from(!answered);
        }
        assert!(given_up > 0, "every call was answered within a millisecond");
        let began = Instant::now();
        loop {
            let listed = agent.list("box").await?;
            if listed.len() == 1 {
                break;
            }
            assert!(began.elapsed().as_secs() < 10, "{listed:?}");
            // One that was made as the call ended has its name: whoever has called ends it.
            for (_, exec) in listed.iter().filter(|(_, exec)| !exec.is_empty()) {
                let _ = agent.signal("box", exec, 9, false).await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Its id is free again.
        assert_eq!(agent.exec("box", "e1", |p| p["args"] = json!(["echo", "x"])).await?.output(), "x\n");
        agent.signal("box", "", 9, false).await?;
        assert_eq!(agent.finish(held).await?.status, 137);
    }
}

component! {
    async fn an_exec_has_the_priorities_that_it_or_its_container_asks_for(agent: &Agent) {
        let held = agent.create("box", |s| {
            s["process"]["args"] = json!(["sleep", "50"]);
            s["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
            s["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 3});
        }).await?;
        agent.start_container("box").await?;
        let look = |p: &mut Value| {
            // Policy and niceness, as proc(5) numbers a process's fields.
            let line = "ionice -p $$; awk '{ print $41, $19 }' /proc/$$/stat";
            p["args"] = json!(["sh", "-c", line]);
        };
        let own = agent.exec("box", "own", |p| {
            look(p);
            p["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
            p["scheduler"] = json!({"policy": "SCHED_OTHER", "nice": 5});
        }).await?;
        assert_eq!(own.output(), "idle\n0 5\n");
        let inherited = agent.exec("box", "inherited", look).await?;
        assert_eq!(inherited.output(), "best-effort: prio 6\n3 3\n");
        agent.signal("box", "", 9, false).await?;
        assert_eq!(agent.finish(held).await?.status, 137);
    }
}

component! {
    /// In a sandbox without a container of its own.
    async fn containers_share_process_ids(agent: &Agent) {
        let shares = |spec: &mut Value| {
            for namespace in spec["linux"]["namespaces"].as_array_mut().expect("namespaces") {
                if namespace["type"] == "pid" {
                    namespace["path"] = json!("/run/husk/pid");
                }
            }
            spec["mounts"].as_array_mut().expect("mounts")
                .push(json!({"destination": "/proc", "type": "proc", "source": "proc"}));
        };
        let first = agent.create("first", |s| {
            shares(s);
            s["process"]["args"] = json!(["sleep", "501"]);
        }).await?;
        agent.start_container("first").await?;
        // An orphan of the second one is collected by the first process of all, which shows nothing.
        let look = "(sleep 0.1 &); ps | grep -c '[s]leep 501'; readlink /proc/self/ns/pid; sleep 0.5; \
            ps -o stat,comm | grep -c '^Z'; ls /proc/1/root/ | wc -l; grep CapPrm /proc/1/status; \
            kill -9 1; kill -9 $(ps | awk '/[s]leep 501/ { print $1 }')";
        let ran = shell(agent, look, shares).await?;
        let lines: Vec<_> = ran.output().lines().collect();
        assert_eq!(lines.len(), 5, "{lines:?} {}", ran.error());
        assert_eq!((lines[0], lines[2], lines[3]), ("1", "0", "0"), "{lines:?} {}", ran.error());
        assert_eq!(lines[4], "CapPrm:\t0000000000000000");
        assert_eq!(agent.finish(first).await?.status, 137);
        let again = shell(agent, "readlink /proc/self/ns/pid", shares).await?;
        assert_eq!(again.output().trim_end(), lines[1]);
    }
}

component! {
    async fn many_short_processes_at_once(agent: &Agent) {
        let held = agent.create("box", |s| s["process"]["args"] = json!(["sleep", "500"])).await?;
        agent.start_container("box").await?;
        for round in 0..5 {
            let runs = (0..8u32).map(|n| async move {
                let script = format!("echo {n}; exit {n}");
                let id = format!("r{round}n{n}");
                agent.exec("box", &id, |p| p["args"] = json!(["sh", "-c", script])).await
            });
            for (n, ran) in (0..8u32).zip(futures::future::join_all(runs).await) {
                let ran = ran?;
                assert_eq!((ran.output(), ran.status), (format!("{n}\n").as_str(), n));
                assert_eq!(ran.output_bytes, 2);
            }
        }
        agent.signal("box", "", 9, false).await?;
        assert_eq!(agent.finish(held).await?.status, 137);
    }
}

component! {
    async fn terminals_are_terminals(agent: &Agent) {
        let mut container = agent.create_on_terminal("tty", |s| {
            s["process"]["args"] = json!(["sh", "-c", "tty; stty size; read line; echo \"<$line>\"; test -t 2 && echo yes"]);
        }).await?;
        agent.start_container("tty").await?;
        container.feed(b"typed\n").await?;
        let ran = agent.finish(container).await?;
        // The echo of what is typed comes whenever it is typed.
        let output = ran.output().replacen("typed\r\n", "", 1);
        assert!(output.starts_with("/dev/"), "{output}");
        let (_, rest) = output.split_once("\r\n").unwrap_or_default();
        assert_eq!(rest, "40 100\r\n<typed>\r\nyes\r\n");
        assert_eq!(usize::try_from(ran.output_bytes)?, ran.output.len());
    }
}

component! {
    async fn background_children_keep_writing(agent: &Agent) {
        let container = agent.create("back", |s| {
            s["process"]["args"] = json!(["sh", "-c", "(sleep 0.2; echo late) & echo early; exec sleep 3"]);
        }).await?;
        agent.start_container("back").await?;
        let ran = agent.finish(container).await?;
        assert_eq!(ran.output(), "early\nlate\n");
    }
}

component! {
    async fn nothing_is_left_behind(agent: &Agent) {
        for _ in 0..3 {
            assert_eq!(shell(agent, "mkdir /sys/fs/cgroup/x; sleep 100 & exit 0", |_| {}).await?.status, 0);
        }
        let left: Vec<_> = std::fs::read_dir(agent.guest_path("/sys/fs/cgroup/husk"))?
            .filter_map(|e| e.ok().filter(|e| e.path().is_dir()).map(|e| e.path()))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(std::fs::read_dir(agent.guest_path("/run/husk-agent"))?.count(), 0);
        assert_eq!(agent.descriptors()?, agent.descriptors_at_start);
    }
}

component! {
    /// Says how long each step takes; in the test machine with one instruction a nanosecond, how
    /// many instructions.
    async fn steps_are_timed(agent: &Agent) {
        for _ in 0..3 {
            let begin = Instant::now();
            let held = agent.create("timed", |_| {}).await?;
            let created = begin.elapsed();
            agent.start_container("timed").await?;
            agent.wait("timed", "").await?;
            let waited = begin.elapsed() - created;
            let ran = agent.finish(held).await?;
            let deleted = begin.elapsed() - waited - created;
            assert_eq!(ran.status, 0);
            println!("create {created:?}, start to exit {waited:?}, delete {deleted:?}");
        }
    }
}

component! {
    async fn shells_of_the_host_run_in_no_container(agent: &Agent) {
        let busybox = std::fs::read("/bin/busybox")?;
        let line = "cat; echo err >&2; grep ^0:: /proc/self/cgroup; sleep 1000 & exit 7";
        let mut held = agent.begin_shell("one", &busybox, line, false).await?;
        let again = harness::refusal(agent.begin_shell("one", &busybox, "", false).await);
        assert_eq!(again.0, Code::ALREADY_EXISTS);
        held.feed(b"in\n").await?;
        held.close();
        agent.close_input("", "one").await?;
        let ran = agent.finish(held).await?;
        assert_eq!((ran.output(), ran.error()), ("in\n0::/shell-one\n", "err\n"));
        assert_eq!((ran.status, ran.output_bytes, ran.error_bytes), (7, 17, 4));

        let line = "tty; stty size; kill -9 $$";
        let ran = agent.finish(agent.begin_shell("two", &busybox, line, true).await?).await?;
        assert!(ran.output().starts_with("/dev/pts/") && ran.output().contains("40 100"));
        assert_eq!(ran.status, 137);

        // Deleting one that runs ends it.
        let line = "sleep 1000 & sleep 1000";
        drop(agent.begin_shell("three", &busybox, line, false).await?);
        agent.delete_exec("", "three").await?;
        assert_eq!(harness::refusal(agent.wait("", "three").await).0, Code::NOT_FOUND);

        let (code, text) = harness::refusal(agent.begin_shell("bad", b"text", "", false).await);
        assert!(code == Code::UNKNOWN && text.contains("exec format error"), "{text}");
        let (code, _) = harness::refusal(agent.begin_shell("../x", b"", "", false).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        for name in ["one", "two", "three", "bad"] {
            let left = agent.guest_path(&format!("/run/husk-agent/shell-{name}"));
            assert!(!left.exists(), "{}", left.display());
        }
    }
}
