//! Where the prompts of all tasks are stored: a folder or a bucket.
//!
//! Every store has the same layout: `<task>/versions/<id>/` with a version's files, `<task>/active.json` which says what
//! answers, and perhaps the files of a plain PEFT directory in `<task>/` itself.

mod bucket;
mod folder;
mod health;
mod interface;
mod location;

use std::io;

use bucket::BucketStore;
use folder::FolderStore;
pub use health::Away;
pub use interface::{Active, Basis, Contents, Found, Mark, ReadError, Stamp, Store, WriteError};
pub use location::{Bucket, PromptLocation};

/// Opens the store at a location. A folder is made if it is not there.
pub fn open(location: &PromptLocation) -> io::Result<Box<dyn Store>> {
    Ok(match location {
        PromptLocation::Folder(root) => Box::new(FolderStore::open(root)?),
        PromptLocation::Bucket(bucket) => Box::new(BucketStore::open(bucket)?),
    })
}
