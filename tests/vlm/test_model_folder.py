"""A model's folder is replaced whole, and only what is a model's goes."""

import errno
import os

import pytest

from covr_fast.vlm.model.folder import model_folder, replaced_model


def save(folder, text):
    with replaced_model(folder) as new:
        (new / "model.safetensors").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def check(folder, text):
    """The folder contains this model and the user's notes, and nothing is left beside it."""
    assert (folder / "model.safetensors").read_text() == text
    assert (folder / "notes" / "a.txt").read_text() == "mine"
    assert names(folder) == ["model.safetensors", "notes"]
    assert names(folder.parent) == ["model"]


@pytest.fixture
def used(tmp_path):
    folder = tmp_path / "model"
    save(folder, "one")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    return folder


def test_the_old_model_goes_and_other_files_stay(used):
    (used / "adapter_config.json").write_text("{}")
    save(used, "two")
    check(used, "two")


def test_a_failure_changes_nothing(used):
    with pytest.raises(TypeError):
        save(used, 12)
    check(used, "one")


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_killed_at_any_move(used, monkeypatch, calls):
    """Either model is found, whole, and the next save ends what was begun."""

    class Killed(BaseException):
        pass

    def replace(*paths, replace=os.replace, left=[calls]):  # noqa: B006
        left[0] -= 1
        if left[0] <= 0:
            raise Killed
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            save(used, "two")
    assert (model_folder(used) / "model.safetensors").read_text() == ("two" if calls == 3 else "one")
    save(used, "three")
    check(used, "three")


def test_killed_while_writing(used):
    (used.parent / ".model.new").mkdir()
    (used.parent / ".model.new" / "config.json").write_text("half")
    assert model_folder(used) == used
    save(used, "two")
    check(used, "two")


def test_folders_of_like_names_are_left_alone(used):
    others = [used.with_name("model.old"), used.with_name("model.new")]
    for other in others:
        other.mkdir()
        (other / "backup").write_text("mine")
    save(used, "two")
    assert [(other / "backup").read_text() for other in others] == ["mine", "mine"]


def test_a_link_to_a_folder_stays_one(used, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(used)
    save(link, "two")
    assert link.is_symlink()
    assert (used / "model.safetensors").read_text() == "two"


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file: give the name of a folder"):
        save(tmp_path / "model", "one")
    assert (tmp_path / "model").read_text() == "mine"
    assert names(tmp_path) == ["model"]


def test_a_config_that_is_no_models(tmp_path):
    """As in the folder of a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"steps": 3}')
    save(folder, "adapter")
    assert (folder / "config.json").read_text() == '{"steps": 3}'
    with (
        pytest.raises(FileExistsError, match=r"config\.json belongs to no model"),
        replaced_model(folder) as new,
    ):
        (new / "config.json").write_text('{"model_type": "llava"}')
    assert (folder / "config.json").read_text() == '{"steps": 3}'
    assert names(folder) == ["config.json", "model.safetensors"]
    assert names(tmp_path) == ["run"]


def test_the_working_directory(used, monkeypatch):
    monkeypatch.chdir(used)
    for folder in (used, type(used)(".")):
        with pytest.raises(OSError, match=r"cannot be replaced.*working directory.*a new folder inside it"):
            save(folder, "two")
    check(used, "one")


def test_a_folder_that_cannot_be_moved(used, monkeypatch):
    """Such as one where a file system is mounted."""

    def busy(*_paths):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(OSError, match=r"cannot be replaced.*busy.*a new folder inside it"):
        save(used, "two")
    check(used, "one")
