//! System messages.

use phi3::text::{ChatTemplate, Message};

/// Says so if the template drops system messages, as Phi-3-medium's does. Templates that refuse
/// them say it themselves, when they render.
pub fn warn_if_ignored(template: &ChatTemplate, system: &str) {
    let question = Message::user("?");
    let without = template.render(std::slice::from_ref(&question), true);
    let with = template.render(&[Message::system(system), question], true);
    if let (Ok(with), Ok(without)) = (with, without)
        && with == without
        && !system.is_empty()
    {
        tracing::warn!("this model's chat template ignores system messages");
    }
}
