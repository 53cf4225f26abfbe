import json
from pathlib import Path

import pytest

from sidestep.acestep.prompts import apply_tag, caption_prompt, choose_genre, lyrics_prompt

GOLDEN = json.loads((Path(__file__).parent / "data/golden/text_and_tensors.json").read_text(encoding="utf-8"))
METAS = {"bpm": 120, "timesignature": "4", "keyscale": "C major", "duration": 30}


@pytest.mark.parametrize("position", ["prepend", "append", "replace"])
def test_caption_prompts_are_ace_steps_own_to_the_byte(position):
    caption = apply_tag("a calm piano piece", "mytag", position)
    assert caption_prompt(caption, **METAS) == GOLDEN["prompt"][position]


def test_a_genre_line_takes_the_place_of_the_caption():
    assert caption_prompt(apply_tag("piano, ambient", "mytag", "prepend"), **METAS) == GOLDEN["prompt_genre"]


def test_unknown_metas_are_written_as_not_available():
    prompt = caption_prompt("cap", bpm=None, timesignature="", keyscale="", duration=7)
    assert prompt == GOLDEN["prompt_missing_meta"]


def test_the_lyrics_prompt_is_that_of_inference_to_the_byte():
    text = caption_prompt("mytag, a calm piano piece", **METAS)
    lyrics = lyrics_prompt("[Verse]\nhello world\n[Chorus]\nsing along", "en")
    assert f"{text}\n\n{lyrics}" == GOLDEN["inference"]["text_and_lyrics"]


def test_empty_lyrics_are_instrumental():
    assert lyrics_prompt(" \n", "unknown") == "# Languages\nunknown\n\n# Lyric\n[Instrumental]<|endoftext|>"


def test_braces_in_lyrics_are_left_alone():
    assert "oh {yeah} {0}" in lyrics_prompt("oh {yeah} {0}", "en")


def test_a_tag_stands_alone_beside_an_empty_caption():
    assert [apply_tag("", "tag", position) for position in ("prepend", "append", "replace")] == ["tag"] * 3
    assert apply_tag("cap", "", "replace") == "cap"


def test_the_genre_ratio_chooses_the_same_songs_as_ace_step():
    assert choose_genre(10, 30) == {7, 3, 2}
    assert choose_genre(10, 0) == set()
    assert choose_genre(3, 50) == {1}
    assert choose_genre(4, 100) == {0, 1, 2, 3}
