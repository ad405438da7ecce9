import subprocess

import torch

from d2ft_fl.records.versions import commit, same_code, versions


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_what_a_run_is_made_with():
    found = versions()
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert set(found["packages"]) == {"d2ft-fl", "torch", "flwr", "timm", "peft", "numpy"}
    assert all(found["packages"].values())
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["cpus"] >= 1
    assert found["gpu"] is None


def test_a_checkout_has_a_commit_and_may_have_changes(tmp_path):
    file = tmp_path / "code.py"
    file.write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = commit(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["changed"] is False
    file.write_text("2")
    assert commit(tmp_path) == {"commit": clean["commit"], "changed": True}


def test_a_copy_is_known_by_its_code(tmp_path):
    for name in ("ours", "theirs"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "one.py").write_text("1")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert same_code(ours, theirs)
    (theirs / "more.py").write_text("")  # a Flower app is packed without some files
    assert same_code(ours, theirs)
    (theirs / "inner" / "one.py").write_text("2")
    assert not same_code(ours, theirs)
    (theirs / "inner" / "one.py").unlink()
    assert not same_code(ours, theirs)


def test_without_git_there_is_no_commit(tmp_path):
    assert commit(None) == {"commit": None, "changed": None}
    (tmp_path / ".git").write_text("nothing")
    assert commit(tmp_path) == {"commit": None, "changed": None}
