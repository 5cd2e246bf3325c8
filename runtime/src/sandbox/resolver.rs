//! Names, asked by the guest of a name server that the engine runs in the sandbox's network namespace.
//!
//! What the guest sends is bounded: a question's length by its two bytes, questions under way by [`MOST`].
//! Their content goes nowhere but to that name server, which containers can ask whatever they like.

use std::sync::{Arc, Weak};
use std::time::Duration;

use husk_agent_protocols::resolver::Header;
use slog::{debug, warn};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::network::SandboxNetwork;

/// Questions under way; more wait to be read. Each has a socket of the shim's.
const MOST: usize = 64;

/// For an answer, after which whoever asked has given up.
const PATIENCE: Duration = Duration::from_secs(20);

/// Answers what comes on `stream`, until the guest closes it or sends what is no question.
pub(super) async fn serve(stream: UnixStream, network: Weak<SandboxNetwork>) {
    let (mut questions, answers) = stream.into_split();
    let answers = Arc::new(Mutex::new(answers));
    let room = Arc::new(Semaphore::new(MOST));
    // They end with this task.
    let mut under_way = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        while under_way.try_join_next().is_some() {}
        let mut header = [0; Header::LENGTH];
        if questions.read_exact(&mut header).await.is_err() {
            return;
        }
        let Some(network) = network.upgrade() else { return };
        let Some(header) = Header::from_bytes(header) else {
            return warn!(network.log, "network: no question for the name server from the guest");
        };
        let mut question = vec![0; header.length.into()];
        if questions.read_exact(&mut question).await.is_err() {
            return;
        }
        let answers = Arc::clone(&answers);
        under_way.spawn(async move {
            let asking = network.ask(header.carrier, &question);
            match timeout(PATIENCE, asking).await.unwrap_or_else(|late| Err(late.into())) {
                Ok(answer) => {
                    let message = Header::before(header.carrier, header.number, &answer);
                    // The guest may have gone meanwhile.
                    let _ = answers.lock().await.write_all(&message.unwrap_or_default()).await;
                }
                Err(error) => {
                    debug!(network.log, "network: no answer from the name server"; "error" => %error);
                }
            }
            drop(permit);
        });
    }
}
