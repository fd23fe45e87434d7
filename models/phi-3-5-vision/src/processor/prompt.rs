//! Where the images of a prompt go: tags `<|image_1|>`, `<|image_2|>`, ….

use super::{Error, Result};

/// A tag in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageTag {
    /// Its bytes in the text.
    pub range: std::ops::Range<usize>,
    /// The number in it; the largest `usize` for one that is larger.
    pub number: usize,
}

/// A prompt between and at its tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptPart<'a> {
    /// Text, which may be empty. Each part of text is tokenized by itself, with the tokenizer's own
    /// BOS: so does the reference.
    Text(&'a str),
    /// Image `number`, counted from 1.
    Image(usize),
}

/// The tags of a text, in order.
pub fn tags(text: &str) -> Vec<ImageTag> {
    const OPEN: &str = "<|image_";
    let mut tags = Vec::new();
    let mut from = 0;
    while let Some(found) = text.get(from..).and_then(|rest| rest.find(OPEN)) {
        let start = from + found;
        let digits_start = start + OPEN.len();
        let rest = text.get(digits_start..).unwrap_or_default();
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        from = digits_start;
        if digits > 0
            && rest
                .get(digits..)
                .is_some_and(|tail| tail.starts_with("|>"))
        {
            let end = digits_start + digits + 2;
            let number = rest.get(..digits).and_then(|digits| digits.parse().ok());
            tags.push(ImageTag {
                range: start..end,
                number: number.unwrap_or(usize::MAX),
            });
            from = end;
        }
    }
    tags
}

/// Splits a prompt that shows `images` images at its tags.
///
/// ```
/// use phi_3_5_vision::processor::{PromptPart::{Image, Text}, split_prompt};
/// let parts = split_prompt("a <|image_1|>", 1)?;
/// assert_eq!(parts, [Text("a "), Image(1), Text("")]);
/// assert!(split_prompt("a <|image_2|>", 1).is_err());
/// # Ok::<(), phi_3_5_vision::processor::Error>(())
/// ```
///
/// # Errors
/// [`Error::Tags`] if the tags are not 1 to `images`, each once. (The reference takes a repeated
/// tag and then fails in the model, because an image has features for one place only.)
pub fn split_prompt(text: &str, images: usize) -> Result<Vec<PromptPart<'_>>> {
    let tags = tags(text);
    let mut numbers: Vec<usize> = tags.iter().map(|tag| tag.number).collect();
    numbers.sort_unstable();
    if numbers != (1..=images).collect::<Vec<_>>() {
        let count = match images {
            1 => "is 1 image".to_owned(),
            _ => format!("are {images} images"),
        };
        let found: Vec<String> = numbers.iter().map(|n| format!("<|image_{n}|>")).collect();
        return Err(Error::Tags(format!(
            "the prompt has {}, but there {count}; each must be named once, from <|image_1|> on",
            if found.is_empty() {
                "no image tag".to_owned()
            } else {
                found.join(", ")
            }
        )));
    }
    let mut parts = Vec::with_capacity(tags.len() * 2 + 1);
    let mut from = 0;
    for tag in tags {
        parts.push(PromptPart::Text(
            text.get(from..tag.range.start).unwrap_or_default(),
        ));
        parts.push(PromptPart::Image(tag.number));
        from = tag.range.end;
    }
    parts.push(PromptPart::Text(text.get(from..).unwrap_or_default()));
    Ok(parts)
}

/// The ids of a prompt: text as `tokenize` gives it, piece by piece and with what the tokenizer puts
/// in front, and for image k of `tokens[k - 1]` tokens as many times -k.
///
/// Features are laid down in the order of the images, not of the tags: a prompt that names
/// image 2 first has image 1's features there. So does the reference.
///
/// ```
/// use phi_3_5_vision::processor::{Error, prompt_ids};
/// let bytes = |text: &str| Ok::<_, Error>([1].into_iter().chain(text.bytes().map(u32::from)).collect());
/// assert_eq!(prompt_ids("A<|image_1|>", &[3], bytes)?, [1, 65, -1, -1, -1, 1]);
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// Those of [`split_prompt`] and of `tokenize`.
pub fn prompt_ids<E: From<Error>>(
    text: &str,
    tokens: &[usize],
    mut tokenize: impl FnMut(&str) -> std::result::Result<Vec<u32>, E>,
) -> std::result::Result<Vec<i64>, E> {
    let mut ids = Vec::new();
    for part in split_prompt(text, tokens.len())? {
        match part {
            PromptPart::Text(text) => ids.extend(tokenize(text)?.into_iter().map(i64::from)),
            PromptPart::Image(number) => {
                let count = number.checked_sub(1).and_then(|index| tokens.get(index));
                ids.extend(std::iter::repeat_n(
                    -(number as i64),
                    count.copied().unwrap_or(0),
                ));
            }
        }
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_tags_count() {
        assert!(tags("<|image_|> <|image_1> <|image|> <image_1>").is_empty());
        let found = tags("é<|image_<|image_12|>x<|image_99999999999999999999|>");
        assert_eq!(found[0].number, 12);
        assert_eq!(found[1].number, usize::MAX);
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn tags_must_be_those_of_the_images() {
        for (text, images) in [
            ("<|image_1|>", 0),
            ("", 1),
            ("<|image_0|>", 1),
            ("<|image_1|><|image_3|>", 2),
            ("<|image_1|><|image_1|>", 1),
            ("<|image_1|><|image_1|>", 2),
        ] {
            assert!(split_prompt(text, images).is_err(), "{text}");
        }
        assert_eq!(
            split_prompt("<|image_2|><|image_1|>", 2).map(|parts| parts.len()),
            Ok(5)
        );
    }
}
