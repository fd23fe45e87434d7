//! What a repo's weights are, without fetching them.

use std::collections::HashMap;
use std::io::Read;
use std::path::PathBuf;

use ureq::http::StatusCode;

use super::download::{Download, Listed};
use super::error::HubError;
use super::failure::{Failure, network};
use super::http::{About, Client};
use super::listing::Selection;
use crate::checkpoint::TensorEntry;
use crate::error::Error;
use crate::safetensors::{Header, INDEX, SINGLE, read_weight_map};

/// Where a model is after a look at it.
pub(crate) enum Seen {
    /// Wholly on disk: a folder, or a GGUF file.
    Here(PathBuf),
    /// The small files are in a folder; the weights are on the hub, and hold these tensors.
    Remote {
        folder: PathBuf,
        tensors: Vec<TensorEntry>,
    },
}

impl Download<'_> {
    /// Fetches the small files of a model in Hugging Face's layout, and of its weights the headers, if
    /// they are not here. A GGUF file, whose header has no stated length, comes as a whole.
    pub(super) fn look(&self) -> Result<Seen, Error> {
        let (client, listing) = match self.list()? {
            Listed::Cached(path) => return Ok(Seen::Here(path)),
            Listed::Found(client, listing) => (client, listing),
        };
        let (commit, selection) = self.select(&client, &listing)?;
        let (mut small, sharded) = match selection {
            Selection::Gguf(_) => return self.fetch(&client, &listing).map(Seen::Here),
            Selection::Single(files) | Selection::Small(files) => (files, false),
            Selection::Sharded(files) => (files, true),
        };
        small.retain(|file| file != SINGLE);
        let about = About {
            revision: &commit,
            ..self.about()
        };
        for file in &small {
            self.ensure(&client, about, file)?;
        }
        self.remember(&commit)?;

        let folder = self.snapshot(&commit);
        let places: Option<HashMap<String, String>> = match sharded {
            true => Some(read_weight_map(&folder.join(INDEX))?.into_iter().collect()),
            false => None,
        };
        let mut files = match &places {
            Some(places) => places.values().cloned().collect(),
            None => vec![SINGLE.to_owned()],
        };
        files.sort();
        files.dedup();
        if files.iter().all(|file| folder.join(file).is_file()) {
            return Ok(Seen::Here(folder));
        }
        let mut tensors = Vec::new();
        for file in files {
            let header = header(&client, about, &file)?;
            for tensor in header.tensors {
                // As where the files are here, what the index places elsewhere is ignored.
                let place = places.as_ref().map(|places| places.get(&tensor.name));
                if place.is_none_or(|place| place == Some(&file)) {
                    tensors.push(TensorEntry {
                        bytes: tensor.range.len() as u64,
                        name: tensor.name,
                        dtype: tensor.dtype,
                        shape: tensor.shape,
                        file: file.clone(),
                    });
                }
            }
        }
        Ok(Seen::Remote { folder, tensors })
    }
}

/// Reads the header of a safetensors file, and lets go of the rest.
fn header(client: &Client, about: About<'_>, file: &str) -> Result<Header, Error> {
    let about = About {
        file: Some(file),
        ..about
    };
    let url = client.file_url(about.repo_id, about.revision, file);
    let size = client.metadata(about, file)?.size;
    let size = size.ok_or_else(|| HubError::Protocol {
        url: url.clone(),
        detail: "the answer does not say how long the file is".to_owned(),
    })?;
    let mut backoff = client.backoff();
    let start = loop {
        match start_of(client, &url, about) {
            Ok(start) => break start,
            Err(failure) => backoff.wait_or_give_up(failure)?,
        }
    };
    Header::parse_start(&start, size).map_err(|source| Error::Safetensors {
        path: PathBuf::from(format!("{}/{file}", about.repo_id)),
        source,
    })
}

/// The bytes of a safetensors file up to the end of its header.
fn start_of(client: &Client, url: &str, about: About<'_>) -> Result<Vec<u8>, Failure> {
    let (response, uri) = client.get(url, 0)?;
    if response.status() != StatusCode::OK {
        return Err(client.refused(&response, &uri, about));
    }
    let mut body = response.into_body().into_reader();
    let mut start = Vec::new();
    let mut read = |len: u64, start: &mut Vec<u8>| {
        let read = body.by_ref().take(len).read_to_end(start);
        read.map_err(|error| Failure::transient(network(&uri, &error)))
    };
    read(Header::PREFIX as u64, &mut start)?;
    let len = start
        .first_chunk()
        .map_or(0, |len| u64::from_le_bytes(*len));
    read(len.min(Header::MAX_LEN), &mut start)?;
    Ok(start)
}
