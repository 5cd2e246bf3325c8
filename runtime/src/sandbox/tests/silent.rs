//! Files on a file system that does not answer hold up their own container only.

use super::*;

use husk_silent::SilentFs;

/// A stage with a folder on a file system of its own, which is unmounted before the stage's folder is removed.
struct Held {
    silent: SilentFs,
    stage: Stage,
}

/// `None` where no FUSE can be mounted.
async fn held() -> Option<Held> {
    let mut stage = stage().await;
    stage.follower.bounds.lay_out = Duration::from_secs(2);
    let folder = stage.folder.path().join("silent");
    std::fs::create_dir(&folder).unwrap();
    match SilentFs::mount(&folder) {
        Ok(silent) => Some(Held { silent, stage }),
        Err(error) => {
            husk_skip::skipped(format!("no FUSE can be mounted: {error}"));
            None
        }
    }
}

impl Held {
    fn volume(&self) -> std::path::PathBuf {
        self.stage.folder.path().join("silent")
    }
}

/// Does `other` while `waiting` waits, and sees that it did wait.
async fn meanwhile(waiting: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    let (mut waiting, mut waited) = (std::pin::pin!(waiting), false);
    let other = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        other.await;
    };
    tokio::select! {
        () = &mut waiting => {}
        () = other => waited = true,
    }
    assert!(waited, "it did not wait");
    waiting.await;
}

#[test]
fn a_volume_that_does_not_answer_delays_its_own_container_only() {
    apart(|| async {
        let Some(held) = held().await else { return };
        let first = held.stage.create().await;
        held.silent.fall_silent();
        let volume = held.volume();
        let creating = async {
            let error = held.stage.try_create("b", &volume).await.unwrap_err();
            let error = crate::chain(&error);
            assert!(error.contains("did not answer within"), "{error}");
        };
        meanwhile(creating, async {
            first.start().await.unwrap();
            drop(held.stage.create_as("other").await);
        })
        .await;
        assert_eq!(held.silent.unanswered(), 1);
    });
}

#[test]
fn a_volume_that_falls_silent_keeps_its_container_from_no_deletion() {
    apart(|| async {
        let Some(held) = held().await else { return };
        let container = held.stage.try_create("c", &held.volume()).await.unwrap();
        container.start().await.unwrap();
        held.silent.fall_silent();
        container.init().signal(15, false).await.unwrap();
        container.init().exited().await;
        let deleted = tokio::time::timeout(Duration::from_secs(10), container.delete());
        deleted.await.expect("deleted in time").unwrap();
        held.stage.assert_nothing_shared();
    });
}

#[test]
fn an_output_file_that_does_not_answer_holds_up_no_other() {
    apart(|| async {
        let Some(held) = held().await else { return };
        held.silent.fall_silent();
        let path = held.volume().join("log");
        let paths = |stdout: String| StdioPaths { stdout, ..StdioPaths::default() };
        let (follower, bundle) = (&held.stage.follower, held.stage.folder.path());
        let stuck = paths(format!("file://{}", path.display()));
        let opening = follower.open(&stuck, "c", bundle);
        let beside = held.stage.folder.path().join("beside");
        let other = paths(format!("file://{}", beside.display()));
        tokio::select! {
            opened = opening => panic!("{:?}", opened.map(drop)),
            opened = follower.open(&other, "c", bundle) => drop(opened.unwrap()),
        }
        assert!(beside.exists());
    });
}
