use super::*;

fn spec(name: &str, dtype: &str, shape: &[usize]) -> TensorSpec {
    TensorSpec {
        name: name.to_owned(),
        dtype: dtype.to_owned(),
        shape: shape.to_vec(),
    }
}

fn create(
    specs: Vec<TensorSpec>,
) -> (tempfile::TempDir, PathBuf, Result<SafetensorsWriter, Error>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let writer = SafetensorsWriter::create(&path, specs, &[]);
    (folder, path, writer)
}

fn is_empty(folder: &tempfile::TempDir) -> bool {
    folder.path().read_dir().unwrap().next().is_none()
}

#[test]
fn an_unfinished_file_leaves_nothing() {
    let (folder, _, writer) = create(vec![spec("a", "F32", &[2])]);
    let mut writer = writer.unwrap();
    writer.write(TensorData::F32(&[1.0])).unwrap();
    assert!(!is_empty(&folder));
    let error = writer.finish().unwrap_err().to_string();
    assert!(
        error.contains("tensor a") && error.contains("4 of its 8 bytes"),
        "{error}"
    );
    assert!(is_empty(&folder));

    let (folder, _, writer) = create(vec![spec("a", "F32", &[2])]);
    drop(writer.unwrap());
    assert!(is_empty(&folder));
}

#[test]
fn an_older_file_stays_until_the_new_one_is_complete() {
    let (_folder, path, writer) = create(vec![spec("a", "I64", &[1])]);
    fs::write(&path, "old").unwrap();
    let mut writer = writer.unwrap();
    writer.write(TensorData::I64(&[5])).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    writer.finish().unwrap();
    assert!(fs::read(&path).unwrap().ends_with(&5i64.to_le_bytes()));
}

#[test]
fn values_must_fit_what_was_announced() {
    let (_folder, _, writer) = create(vec![spec("a", "F32", &[1]), spec("b", "F32", &[1])]);
    let mut writer = writer.unwrap();
    let error = writer.write(TensorData::I64(&[1])).unwrap_err().to_string();
    assert!(
        error.contains("tensor a") && error.contains("I64"),
        "{error}"
    );
    let error = writer
        .write(TensorData::F32(&[1.0, 2.0]))
        .unwrap_err()
        .to_string();
    assert!(error.contains("4 bytes more"), "{error}");
    writer.write(TensorData::F32(&[1.0])).unwrap();
    writer.write(TensorData::F32(&[1.0])).unwrap();
    assert!(writer.write(TensorData::F32(&[1.0])).is_err());
    assert!(writer.write_bytes(&[1]).is_err());
}

#[test]
fn announcements_that_make_no_file() {
    for specs in [
        vec![spec("a", "F32", &[1]), spec("a", "F32", &[1])],
        vec![spec("__metadata__", "F32", &[1])],
        vec![spec("a", "Q4_0", &[32])],
        vec![spec("a", "F4", &[3])],
        vec![spec("a", "F32", &[usize::MAX, 2])],
        vec![
            spec("a", "U8", &[usize::MAX]),
            spec("b", "U8", &[usize::MAX]),
        ],
    ] {
        let (folder, _, writer) = create(specs.clone());
        assert!(writer.is_err(), "{specs:?}");
        assert!(is_empty(&folder));
    }
}

#[test]
fn a_folder_that_does_not_exist_is_named() {
    let error = write_safetensors(Path::new("no/such/out.safetensors"), &[], &[]).unwrap_err();
    assert!(error.to_string().contains("out.safetensors"), "{error}");
}
