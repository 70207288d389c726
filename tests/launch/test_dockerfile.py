"""The Dockerfile, as far as it can be read without a builder: its stages, what it copies and installs."""

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
KNOWN = {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "USER"}


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "launch/cluster/Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def test_every_stage_is_made_of_one_before() -> None:
    known = {"python:3.12-slim"}
    for word, rest in instructions():
        assert word in KNOWN
        if word == "FROM":
            base, as_, name = rest.split()
            assert as_ == "AS"
            assert base in known
            known.add(name)
    assert {"cpu", "cuda", "tpu", "ray"} <= known


def test_what_is_copied_is_here_and_is_all_that_installs() -> None:
    copied = {source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    mapped = re.findall(r"= (\w+)", setup["options"]["package_dir"])
    assert {"keysync_jax", "setup.cfg", "pyproject.toml", *mapped} <= copied
    readme = setup["metadata"]["long_description"].removeprefix("file: ")
    assert {readme, setup["metadata"]["license_files"]} <= copied
    extras = set(setup["options.extras_require"])
    for word, rest in instructions():
        for asked in re.findall(r"'\.\[([\w,-]+)\]'", rest) if word == "RUN" else ():
            assert set(asked.split(",")) <= extras
