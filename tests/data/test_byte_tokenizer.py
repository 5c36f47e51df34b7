"""Bytes as tokens; Python's own codec is the reference. Forty languages train with both kinds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUICK, SMALL
from hypothesis import given
from hypothesis import strategies as st

import chargpt
from chargpt.base.errors import UserError
from chargpt.config import DataConfig, SampleConfig
from chargpt.data.byte_tokenizer import ByteTokenizer, tokenizer_from_json
from chargpt.data.corpus import load_corpus
from chargpt.data.encoding import Sizes
from chargpt.data.tokenizer import CharTokenizer
from chargpt.generate import complete, generate
from chargpt.runs.folder import load, load_characters
from chargpt.train import train

BYTES, DOCUMENTS = ByteTokenizer(), ByteTokenizer(end_of_text=True)


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    for tokenizer in (BYTES, DOCUMENTS):
        ids = tokenizer.encode(text)
        assert ids.tolist() == list(text.encode())
        assert tokenizer.decode(ids) == text
        assert tokenizer.n_tokens(text) == len(ids)


@given(st.lists(st.integers(0, 256)))
def test_any_ids_decode_as_pythons_codec_does(ids: list[int]) -> None:
    parts = np.split(np.array(ids), np.flatnonzero(np.array(ids) == 256))
    expected = "".join(
        bytes(int(i) for i in part if i < 256).decode("utf-8", "replace") for part in parts
    )
    assert DOCUMENTS.decode(ids) == expected


def test_a_character_appears_with_its_last_byte() -> None:
    decoder = BYTES.decoder()
    assert [decoder.push(i) for i in "aé€😀".encode()] == [
        *("a", "", "é", "", "", "€", "", "", "", "😀")
    ]
    decoder.push(0xE2)
    assert (decoder.rest(), decoder.rest()) == ("\ufffd", "")
    with pytest.raises(UserError, match="token id 256 is outside the vocabulary of 256"):
        decoder.push(256)


def test_json_keeps_the_kind() -> None:
    for tokenizer in (BYTES, DOCUMENTS, CharTokenizer("abc")):
        again = tokenizer_from_json(tokenizer.to_json())
        assert again == tokenizer
        assert type(again) is type(tokenizer)
    assert CharTokenizer(map(chr, range(256))) != BYTES


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(memory=0, unit=1000, chunk=100)])
def test_a_corpus_of_bytes_is_its_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: Sizes
) -> None:
    monkeypatch.setenv("CHARGPT_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "t.txt"
    documents = [f"{i}: größer 漢字 😀" * 3 for i in range(200)]
    path.write_text("\n".join(documents), encoding="utf-8")
    for separator, expected in (
        ("", [*"\n".join(documents).encode()]),
        ("\n", [i for document in documents for i in (*document.encode(), 256)]),
    ):
        config = DataConfig(tokenizer="byte", document_separator=separator)
        corpus = load_corpus([str(path)], config, sizes=sizes)
        assert np.concatenate([corpus.train, corpus.validation]).tolist() == expected
        assert corpus.tokenizer == ByteTokenizer(end_of_text=bool(separator))


# --- forty languages

LANGUAGES = """
Der schnelle braune Fuchs springt.|Le vif renard brun saute.|El veloz zorro marrón salta.
A rápida raposa marrom pula.|La volpe marrone salta.|De snelle bruine vos springt.
Den kvicka bruna räven hoppar.|Den raske brune rev hopper.|Nopea ruskea kettu hyppää.
Kiire pruun rebane hüppab.|Szybki brązowy lis skacze.|Rychlá hnědá liška skáče.
Rýchla hnedá líška skáče.|A gyors barna róka ugrik.|Vulpea maro sare repede.
Brza smeđa lisica skače.|Hitra rjava lisica skoči.|Ātrā brūnā lapsa lec.
Greita ruda lapė šoka.|Hızlı kahverengi tilki atlar.|Con cáo nâu nhanh nhẹn nhảy.
Rubah coklat cepat melompat.|Ang mabilis na soro ay tumalon.|Mbweha mwepesi anaruka.
Η γρήγορη καφέ αλεπού πηδά.|Быстрая лиса прыгает.|Швидка лисиця стрибає.
Бързата лисица скача.|Брза лисица скаче.|السريع الثعلب البني يقفز.
השועל החום המהיר קופץ.|روباه قهوه‌ای سریع می‌پرد.|تیز بھوری لومڑی چھلانگ لگاتی ہے۔
तेज़ भूरी लोमड़ी कूदती है।|দ্রুত বাদামী শিয়াল লাফায়।|வேகமான நரி தாவுகிறது.
త్వరిత నక్క దూకుతుంది.|สุนัขจิ้งจอกกระโดด|빠른 갈색 여우가 뛴다.
素早い茶色の狐が跳ぶ。|敏捷的棕色狐狸跳。|敏捷的棕色狐狸跳過。
ბილიკი მელა ხტება.|Արագ աղվեսը ցատկում է։|ፈጣን ቀበሮ ይዘላል።
e\u0301 e\u0301tude (NFD)|é étude (NFC)|👩\u200d👩\u200d👧\u200d👦 👍🏽 🏳️\u200d🌈 🇫🇷
"""


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "languages.txt"
    lines = LANGUAGES.replace("\\u0301", "\u0301").replace("\\u200d", "\u200d").replace("|", "\n")
    assert len(lines.split("\n")) > 40
    path.write_text(lines * 12, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("name", ["char", "byte"])
@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_forty_languages_train_and_sample(
    languages: Path, tmp_path: Path, name: Any, kernels: Any
) -> None:
    text = languages.read_text("utf-8")
    result = train(
        str(languages),
        model_config=SMALL.replace(block_size=64),
        train_config=QUICK.replace(kernels=kernels),
        data_config=DataConfig(tokenizer=name),
        out=tmp_path / "run",
        quiet=True,
    )
    model, tokenizer = load(result.run)
    assert tokenizer.vocab_size == (256 if name == "byte" else len(set(text)))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    config = SampleConfig(prompt="لعب 漢字 " if name == "byte" else "狐 ", max_new_tokens=60)
    pieces = [piece for _, piece in generate(model, tokenizer, [config.prompt], config)]
    [completion] = complete(model, tokenizer, [config.prompt], config)
    assert "".join(pieces) == completion.text
    assert len(completion.tokens) == 60
    ids = [token.id for token in completion.tokens]
    expected = bytes(ids).decode("utf-8", "replace") if name == "byte" else tokenizer.decode(ids)
    assert completion.text == expected
    scores = chargpt.score(model, tokenizer, "Быстрая 狐")
    tokens = tokenizer.encode("Быстрая 狐")
    assert scores.shape == (len("Быстрая 狐"),)
    assert name == "byte" or len(tokens) == len(scores)
    assert f"nats/{name}" in result.summary.verdict


def test_models_of_bytes_are_refused_where_characters_are_needed(
    languages: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    data_config = DataConfig(tokenizer="byte")
    options = {"model_config": SMALL, "train_config": QUICK, "quiet": True}
    train(str(languages), data_config=data_config, out=out, **options)
    with pytest.raises(UserError, match="its tokens are bytes, and this needs characters"):
        load_characters(out)
    with pytest.raises(UserError, match="are bytes, not chars: give --tokenizer byte"):
        train(str(languages), start_from=out, out=tmp_path / "next", quiet=True)
    model, tokenizer = load(out)
    for config in (SampleConfig(logit_bias={"ß": 1.0}), SampleConfig(forbidden="ß")):
        with pytest.raises(UserError, match="'ß'"):
            generate(model, tokenizer, [""], config)
    assert "e" not in complete(model, tokenizer, [""], SampleConfig(forbidden="e"))[0].text
