//! `phi3 chat` on a terminal, which util-linux' `script` imitates.

use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::support::{DONE, arg};
use crate::tiny::Tiny;

const UP: &str = "\x1b[A";
const CTRL_C: &str = "\x03";
const CTRL_D: &str = "\x04";

/// A program on a terminal of its own.
struct Terminal {
    child: Child,
    keys: ChildStdin,
    screen: Arc<Mutex<Vec<u8>>>,
    /// How much of the screen has been waited for.
    seen: usize,
}

impl Terminal {
    /// `None`, with the reason printed, where there is no such `script`.
    fn start(args: &[String]) -> Result<Option<Self>> {
        let version = Command::new("script").arg("--version").output();
        if !version.is_ok_and(|version| version.stdout.windows(10).any(|w| w == b"util-linux")) {
            eprintln!("skipped: no util-linux `script` to imitate a terminal");
            return Ok(None);
        }
        let words: Vec<_> = std::iter::once(env!("CARGO_BIN_EXE_phi3"))
            .chain(args.iter().map(String::as_str))
            .map(|word| format!("'{word}'"))
            .collect();
        let mut child = Command::new("script")
            // Without exec a shell in between would take Ctrl-C too.
            .args(["-qec", &format!("exec {}", words.join(" ")), "/dev/null"])
            .env("TERM", "xterm")
            .env("SHELL", "/bin/sh")
            .env("HF_HUB_OFFLINE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let keys = child.stdin.take().context("stdin")?;
        let mut out = child.stdout.take().context("stdout")?;
        let screen = Arc::<Mutex<Vec<u8>>>::default();
        let shown = Arc::clone(&screen);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = out.read(&mut bytes) {
                if let Ok(mut shown) = shown.lock() {
                    shown.extend_from_slice(&bytes[..count]);
                }
            }
        });
        Ok(Some(Self {
            child,
            keys,
            screen,
            seen: 0,
        }))
    }

    /// Waits until the screen shows `text` behind what was waited for before; gives what is between.
    fn wait_for(&mut self, text: &str) -> Result<String> {
        let begun = Instant::now();
        loop {
            let screen = self
                .screen
                .lock()
                .map(|screen| screen.clone())
                .unwrap_or_default();
            let new = &screen[self.seen..];
            let place = new
                .windows(text.len())
                .position(|window| window == text.as_bytes());
            if let Some(place) = place {
                self.seen += place + text.len();
                return Ok(String::from_utf8_lossy(&new[..place]).into_owned());
            }
            if begun.elapsed() > Duration::from_secs(30) {
                bail!("no {text:?} in {:?}", String::from_utf8_lossy(new));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn press(&mut self, keys: &str) -> Result<()> {
        self.keys.write_all(keys.as_bytes())?;
        Ok(self.keys.flush()?)
    }

    /// Waits for the end; gives the exit code.
    fn end(mut self) -> Result<Option<i32>> {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(30) {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.child.kill()?;
        bail!("it did not end")
    }
}

/// What the line editor shows when it waits for a line.
const READY: &str = "\x1b[?2004h";

#[test]
fn history_interruptions_and_the_end() -> Result<()> {
    let tiny = Tiny::new()?;
    let history = tiny.file("state/history").display().to_string();
    let args = tiny.args("chat", &["--max-new-tokens", "9", "--history", &history]);
    let Some(mut first) = Terminal::start(&args)? else {
        return Ok(());
    };
    first.wait_for("/help lists the commands, Ctrl-D leaves.")?;
    first.wait_for(READY)?;
    first.press("first\r")?;
    let answer = first.wait_for("(cut at --max-new-tokens)")?;
    // Ctrl-C at the prompt costs the line, not the conversation.
    first.wait_for(READY)?;
    first.press("half a line")?;
    first.wait_for("half a line")?;
    first.press(CTRL_C)?;
    first.wait_for("(Ctrl-D or /exit leaves)")?;
    first.wait_for(READY)?;
    // Pasted lines are one message; a terminal brackets them.
    first.press("\x1b[200~one\ntwo\x1b[201~")?;
    first.wait_for("two")?;
    first.press("\r")?;
    first.wait_for("(cut at --max-new-tokens)")?;
    first.wait_for(READY)?;
    first.press(CTRL_D)?;
    ensure!(first.end()? == Some(DONE));
    let kept = std::fs::read_to_string(&history)?;
    ensure!(kept == "#V2\nfirst\none\\ntwo\n", "{kept:?}");

    // The next conversation can go back to it.
    let mut second = Terminal::start(&args)?.context("a terminal")?;
    second.wait_for(READY)?;
    second.press(UP)?;
    second.wait_for("two")?;
    // Once within the two lines, once to what came before them.
    second.press(UP)?;
    second.press(UP)?;
    second.wait_for("first")?;
    second.press("\r")?;
    let again = second.wait_for("(cut at --max-new-tokens)")?;
    let text = |screen: &str| screen.rsplit("\x1b[?2004l").next().map(str::to_owned);
    ensure!(text(&again) == text(&answer), "{again:?} {answer:?}");
    second.wait_for(READY)?;
    second.press("/exit\r")?;
    ensure!(second.end()? == Some(DONE));
    Ok(())
}

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() -> Result<()> {
    let tiny = Tiny::new()?;
    // `x` and nothing else, so that the screen can be searched for it.
    let bias = "120=1000";
    let history = arg(&tiny.file("history"));
    let flags = [
        "--max-new-tokens",
        "4000",
        "--logit-bias",
        bias,
        "--history",
        &history,
    ];
    let Some(mut terminal) = Terminal::start(&tiny.args("chat", &flags))? else {
        return Ok(());
    };
    for _ in 0..2 {
        terminal.wait_for(READY)?;
        terminal.press("hello\r")?;
        terminal.wait_for("xxxxx")?;
        terminal.press(CTRL_C)?;
        terminal.wait_for("(stopped)")?;
    }
    terminal.wait_for(READY)?;
    terminal.press(CTRL_D)?;
    ensure!(terminal.end()? == Some(DONE));
    Ok(())
}

#[test]
fn an_answer_cannot_steer_the_terminal() -> Result<()> {
    let tiny = Tiny::new()?;
    let ids = crate::support::stdout(tiny.args("tokenize", &["-p", "\x1b", "--json"]))?;
    let escape = ids.trim().trim_matches(['[', ']']).to_owned();
    escape.parse::<u32>().context("one token")?;
    let bias = format!("{escape}=1000");
    let flags = ["-p", "x", "--max-new-tokens", "3", "--logit-bias", &bias];
    let args = tiny.args("generate", &flags);
    ensure!(
        crate::support::stdout(&args)? == "\x1b\x1b\x1b\n",
        "a file gets it as it is"
    );
    let Some(mut terminal) = Terminal::start(&args)? else {
        return Ok(());
    };
    terminal.wait_for("���\r\n")?;
    ensure!(terminal.end()? == Some(DONE));
    Ok(())
}
