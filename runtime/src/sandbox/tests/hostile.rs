//! Guests that do not let a container go: it can be killed and deleted all the same.

use std::time::SystemTime;

use super::*;
use crate::container::{Bounds, ExecRequest};

/// Exit status of what SIGKILL has ended.
const KILLED: u32 = 128 + 9;

/// Bounds that a test can wait for.
const BOUNDS: Bounds = Bounds {
    kill_answer: Duration::from_millis(300),
    kill_end: Duration::from_millis(300),
    delete: Duration::from_millis(300),
    lay_out: Duration::from_secs(30),
    unmount: Duration::from_secs(30),
};

/// A pod of two running containers, neither of them the sandbox's own.
async fn pod(mood: Mood) -> (Stage, Container, Container) {
    let mut stage = stage().await;
    stage.follower.bounds = BOUNDS;
    let (first, second) = (stage.create_as("first").await, stage.create_as("second").await);
    first.start().await.unwrap();
    second.start().await.unwrap();
    *lock(&stage.mood) = mood;
    (stage, first, second)
}

async fn prompt<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(8), work).await.expect("it is held up")
}

/// Kills one container of the pod, expects all of the machine to be killed with it, and deletes both.
async fn falls(mood: Mood, reason: &str) {
    let (stage, first, second) = pod(mood).await;
    let killed = prompt(first.init().signal(9, false)).await;
    assert_eq!(killed.is_err(), mood.kill == Answer::Refused);
    for container in [&first, &second] {
        assert_eq!(prompt(container.init().exited()).await.status, KILLED);
    }
    let end = stage.follower.machine.ended().expect("it was given up");
    assert!(end.signal == Some(9) && !end.expected && end.reason.contains(reason), "{end:?}");
    for container in [first, second] {
        prompt(container.delete()).await.unwrap();
    }
    stage.assert_nothing_shared();
}

#[test]
fn a_guest_that_is_silent_when_a_member_is_killed_loses_its_machine() {
    apart(|| falls(Mood { kill: Answer::Never, ..Mood::default() }, "did not answer in time"));
}

#[test]
fn a_guest_that_answers_a_kill_and_tells_of_no_end_loses_its_machine() {
    apart(|| falls(Mood { immortal: true, ..Mood::default() }, "did not end"));
}

#[test]
fn a_guest_that_refuses_a_kill_loses_its_machine() {
    apart(|| falls(Mood { kill: Answer::Refused, ..Mood::default() }, "did not end"));
}

#[test]
fn processors_that_do_not_run_again_keep_nothing_alive() {
    apart(|| async {
        let mut stage = stage().await;
        stage.follower.bounds = BOUNDS;
        let container = stage.create_as("member").await;
        container.start().await.unwrap();
        container.pause().await.unwrap();
        stage.machine.silent.store(true, Ordering::Relaxed);
        prompt(container.init().signal(9, false)).await.unwrap();
        assert_eq!(prompt(container.init().exited()).await.status, KILLED);
        prompt(container.delete()).await.unwrap();
        stage.assert_nothing_shared();
    });
}

#[test]
fn an_exec_that_the_guest_does_not_start_can_be_killed() {
    apart(|| async {
        let (stage, first, _second) = pod(Mood::default()).await;
        let process = serde_json::json!({
            "user": {"uid": 0, "gid": 0}, "args": ["x"], "cwd": "/",
        });
        first
            .add_exec(ExecRequest {
                exec_id: "e".to_owned(),
                spec: serde_json::from_value(process).unwrap(),
                stdio: StdioPaths::default(),
            })
            .unwrap();
        let kill = async {
            stage.execs.running.notified().await;
            assert!(first.signal("e", 15, false).await.is_err());
            first.signal("e", 9, false).await
        };
        let (started, killed) = prompt(async { tokio::join!(first.start_exec("e"), kill) }).await;
        started.unwrap_err();
        killed.unwrap();
        assert_eq!(prompt(first.init().exited()).await.status, KILLED);
    });
}

#[test]
fn other_signals_may_be_ignored() {
    apart(|| async {
        let (stage, first, _second) = pod(Mood { immortal: true, ..Mood::default() }).await;
        first.init().signal(15, false).await.unwrap();
        tokio::time::sleep(2 * BOUNDS.kill_end).await;
        assert_eq!(first.init().status(), Status::Running);
        assert_eq!(stage.follower.machine.ended(), None);
    });
}

async fn delete_ended(container: &Container) -> Result<Exit, ContainerError> {
    container.init().exited().await;
    container.delete().await
}

#[test]
fn a_container_goes_whether_the_guest_deletes_it_or_not() {
    for (delete, survives) in [(Answer::Refused, true), (Answer::Never, false)] {
        apart(move || async move {
            let (stage, first, second) = pod(Mood { delete, ..Mood::default() }).await;
            drop(second);
            let mut output =
                pipe::OpenOptions::new().open_receiver(stage.folder.path().join("out")).unwrap();
            first.init().signal(9, false).await.unwrap();
            let mut data = Vec::new();
            let read = output.read_to_end(&mut data);
            let ended = async { tokio::join!(delete_ended(&first), delete_ended(&first)) };
            let (deleted, _) = prompt(async { tokio::join!(ended, read) }).await;
            let (one, other) = deleted;
            assert_eq!(one.unwrap().status, KILLED);
            // Asked for twice at the same time, as by an engine that asks again.
            assert!(matches!(other, Err(ContainerError::NoContainer(_))), "{other:?}");
            assert_eq!(stage.follower.machine.ended().is_none(), survives);
        });
    }
}

#[test]
fn a_created_container_is_deleted_though_its_end_is_never_told() {
    apart(|| async {
        let mut stage = stage().await;
        stage.follower.bounds = BOUNDS;
        let container = stage.create().await;
        assert_eq!(prompt(container.delete()).await.unwrap().status, KILLED);
        stage.assert_nothing_shared();
    });
}

#[test]
fn times_of_an_exit_are_the_hosts() {
    for told in [i64::MIN, 0, 1, i64::MAX] {
        apart(move || async move {
            let mood = Mood { exited_at_nanoseconds: told, ..Mood::default() };
            let before = SystemTime::now();
            let (stage, first, _second) = pod(mood).await;
            let mut output =
                pipe::OpenOptions::new().open_receiver(stage.folder.path().join("out")).unwrap();
            first.init().signal(9, false).await.unwrap();
            let mut data = vec![0; 1 << 20];
            let (exit, _) = tokio::join!(first.init().exited(), output.read_exact(&mut data));
            assert!(exit.at >= before && exit.at <= SystemTime::now(), "{exit:?}");
        });
    }
}
