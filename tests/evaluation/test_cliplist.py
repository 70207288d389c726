"""The list of clips, whose voice each is given, and what a system can be."""

from pathlib import Path

import pytest

from keysync_jax.errors import UserError
from keysync_jax.evaluation.cliplist import ListedClip, draw_partners, read_clips
from keysync_jax.evaluation.protocol import PROTOCOLS, Cell
from keysync_jax.evaluation.systems import parse_system, parse_systems


def listed(*speakers: str) -> list[ListedClip]:
    return [ListedClip(f"c{i}", Path("v"), Path("v"), speaker) for i, speaker in enumerate(speakers)]


def test_partners_are_a_derangement_of_other_speakers() -> None:
    clips = listed(*"aabbccddee")
    for seed in range(30):
        partners = draw_partners(clips, seed)
        speaker = {clip.name: clip.speaker for clip in clips}
        assert sorted(partners.values()) == sorted(speaker)
        assert all(speaker[name] != speaker[partner] for name, partner in partners.items())
    assert draw_partners(clips, 3) == draw_partners(clips, 3)
    assert len({tuple(draw_partners(clips, seed).values()) for seed in range(30)}) > 20


def test_partners_where_no_derangement_is() -> None:
    # One speaker has more clips than all others: their voices are used again, never one of the same person.
    partners = draw_partners(listed(*"aaaab"), 0)
    assert {partners[f"c{i}"] for i in range(4)} == {"c4"}
    # A single speaker: at least another clip.
    alone = draw_partners(listed(*"aaa"), 0)
    assert all(name != partner for name, partner in alone.items())
    assert sorted(alone.values()) == ["c0", "c1", "c2"]
    with pytest.raises(UserError, match="two clips or more"):
        draw_partners(listed("a"), 0)


def test_given_partners_are_kept() -> None:
    clips = listed(*"abcd")
    clips[2] = ListedClip("c2", Path("v"), Path("v"), "c", partner="c0")
    for seed in range(10):
        partners = draw_partners(clips, seed)
        assert partners["c2"] == "c0"
        assert sorted(partners.values()) == ["c0", "c1", "c2", "c3"]


def test_a_list_is_read(tmp_path: Path) -> None:
    for name in ("one.mp4", "two, too.mp4", "two.wav", "two.npy"):
        (tmp_path / name).touch()
    table = tmp_path / "list.csv"
    table.write_text(
        "video,voice,speaker,partner,alternative,landmarks\n"
        'one.mp4,,anna,"two, too",,\n"two, too.mp4",two.wav,,,7,two.npy\n'
    )
    first, second = read_clips(table)
    assert (first.voice, first.speaker, first.partner) == (first.video, "anna", "two, too")
    assert (second.name, second.speaker, second.alternative) == ("two, too", "two, too", 7)
    assert (second.voice.name, second.landmarks and second.landmarks.name) == ("two.wav", "two.npy")
    found = read_clips(tmp_path)
    assert [clip.name for clip in found] == ["one", "two, too"]
    assert found[0].landmarks is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names the columns"),
        ("video,sound\na.mp4,b\n", "'sound' is none"),
        ("video\nnothing.mp4\n", "line 2: the video .* is not there"),
        ("video,voice\na.mp4\n", "line 2 has not as many columns"),
        ("video\na.mp4\na.mp4\n", "two clips are called a"),
        ("video,partner\na.mp4,a\n", "is no other clip"),
        ("video,alternative\na.mp4,-1\n", "a frame's number"),
        ("video\n", "lists no clip"),
        ("video,voice\n,a.mp4\n", "names no video"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "a.mp4").touch()
    table = tmp_path / "list.csv"
    table.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_clips(table)


def test_a_command_is_split_before_it_is_filled_in() -> None:
    system = parse_system('ours=sh -c \'cp "$0" "$1"\' {video} {out} --voice={audio}')
    words = system.words({"video": "a b;$(rm x).mp4", "audio": "'", "out": "{video}"})
    assert words == ["sh", "-c", 'cp "$0" "$1"', "a b;$(rm x).mp4", "{video}", "--voice='"]
    assert system.references == ("AR",)
    assert parse_system("ours=sh {video} {audio} {out} {reference_index}").references == ("CR", "AR")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sh {video} {audio} {out}", "NAME=COMMAND"),
        ("a=sh {video} {audio}", r"command with \{out\}"),
        ("a=sh {video} {audio} {out} {model}", r"\{model\} is none of"),
        ("a=sh {video.__class__} {audio} {out}", "is none of"),
        ("a=sh {video} {audio} {out} '", "cannot be read"),
        ("a=no-such-program {video} {audio} {out}", "there is no program no-such-program"),
        ("a=no/such/folder", r"command with \{video\}"),
    ],
)
def test_what_is_no_system_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_systems([text])


def test_sheets_and_folders(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.json"
    sheet.write_text(
        '{"command": "sh {video} {audio} {out} {reference}", "references": ["alternative"], "licence": "MIT"}'
    )
    one, two = parse_systems([f"one={sheet}", f"two={tmp_path}"])
    assert (one.references, dict(one.sheet)) == (("AR",), {"licence": "MIT"})
    assert not one.runs(Cell("AM", "CR"))
    assert one.runs(Cell("AM"))
    (tmp_path / "XM-CR").mkdir()
    (tmp_path / "AM").mkdir()
    for place in ("XM-CR/clip.mp4", "AM/clip.mkv", "clip.mp4"):
        (tmp_path / place).touch()
    assert two.references == ("AR",)
    assert parse_system(f"two={tmp_path}").references == ("CR", "AR")
    assert two.file(Cell("XM", "CR"), "clip", 6) == tmp_path / "XM-CR/clip.mp4"
    assert two.file(Cell("AM", "AR"), "clip", 6) == tmp_path / "AM/clip.mkv"
    assert two.file(Cell("SI"), "clip", 2) is None
    assert two.file(Cell("SI"), "clip", 1) == tmp_path / "clip.mp4"
    with pytest.raises(UserError, match="two systems are called one"):
        parse_systems([f"one={sheet}", f"one={tmp_path}"])
    sheet.write_text('{"command": "sh {video} {audio} {out}", "references": ["nearest"]}')
    with pytest.raises(UserError, match="a list of current, alternative"):
        parse_system(f"one={sheet}")


def test_leakage_is_six_runs() -> None:
    assert [cell.name for cell in PROTOCOLS["leakage"]] == [
        "AM-CR", "XM-CR", "SI-CR", "AM-AR", "XM-AR", "SI-AR",
    ]  # fmt: skip
