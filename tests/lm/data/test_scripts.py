"""Chinese, Japanese and Thai: ordinary text is kept, copies are found, personal data needs no spaces around it."""

import json

import pytest

from fastattn.lm.data import Report, find_sources
from fastattn.lm.data.duplicates import near_keys
from fastattn.lm.data.identity import NUMBERS, verhoeff
from fastattn.lm.data.personal import KINDS, mask
from fastattn.lm.data.pipeline import Cleaning
from fastattn.lm.data.quality import RULES, Lengths, Text, broken_rule
from fastattn.lm.data.scripts import is_unspaced, units
from fastattn.lm.train.prepare import PrepareConfig, prepare_at

CHINESE = (
    "注意力机制让模型在处理每一个词的时候，都能看到整个句子里的其他词，并且按照它们的重要程度分配权重。"
    "这种方法最早用于机器翻译，后来成为大多数语言模型的基础。与循环网络不同，它可以同时计算所有位置，"
    "所以训练的速度更快，也更容易利用现代的硬件。不过，当文本很长时，计算量会随着长度的平方增长，这是它的主要缺点。"
)
JAPANESE = (
    "注意機構は、文の中のすべての単語を一度に見て、それぞれの重要さに応じて重みを付ける仕組みである。最初は機械翻訳のために"
    "考えられたが、今ではほとんどの言語モデルの基礎になっている。再帰型のネットワークと違い、すべての位置を同時に計算できるため、"
    "学習が速く、新しい計算機の力をうまく使うことができる。"
)
THAI = (
    "กลไกความสนใจช่วยให้แบบจำลองมองเห็นคำทั้งหมดในประโยคพร้อมกัน และให้น้ำหนักแก่แต่ละคำตามความสำคัญของมัน "
    "วิธีนี้ถูกใช้ครั้งแรกในการแปลภาษาด้วยเครื่อง และต่อมาได้เป็นพื้นฐานของแบบจำลองภาษาส่วนใหญ่ที่มีอยู่ในปัจจุบัน"
)
TEXTS = {"Chinese": CHINESE, "Japanese": JAPANESE, "Thai": THAI}


@pytest.mark.parametrize("name", TEXTS)
def test_ordinary_text_breaks_no_rule(name):
    assert is_unspaced(TEXTS[name]) and broken_rule(TEXTS[name], code=False, lengths=Lengths()) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("你好。", "too-short"),
        ("壹贰叁肆伍陆柒捌玖拾" * 2 + "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉戌亥金木水火土" * 2, "stop-words"),
        (CHINESE[:50] * 4, "repeated-runs"),
    ],
)
def test_bad_text_is_dropped_in_every_script(text, rule):
    assert broken_rule(text, False, Lengths(), frozenset(RULES) - {rule}) == rule


def test_characters_are_words_where_there_are_no_spaces():
    assert units("用 GPU 训练GPT-2模型") == ["用", "GPU", "训", "练", "GPT", "2", "模", "型"]
    assert (
        not is_unspaced("Das Wort 注意 steht hier.")
        and not is_unspaced("")
        and not is_unspaced("한국어는 띄어쓰기가 있다")
    )
    assert Text(CHINESE).covered_by_repeats(5) == 0


@pytest.mark.parametrize("name", TEXTS)
def test_near_duplicates_by_characters(name):
    text = TEXTS[name]
    changed = text[:60] + "ๆ" + text[61:]  # one character of many
    assert set(near_keys(text)) & set(near_keys(changed))
    assert not set(near_keys(text)) & set(near_keys(text[::-1]))


NUMBERS_OF = {
    "BR": ("529.982.247-25", "529.982.247-26"),
    "CA": ("130 692 544", "130 692 545"),
    "CN": ("11010519491231002X", "110105194912310021"),
    "ES": ("12345678Z", "12345678A"),
    "FR": ("2 55 08 14 168 025 38", "2 55 08 14 168 025 39"),
    "GB": ("AB 12 34 56 C", "GB 12 34 56 C"),
    "IN": ("2341 2341 2346", "2341 2341 2347"),
    "IT": ("RSSMRA85T10A562S", "RSSMRA85T10A562T"),
    "KR": ("800101-1234560", "800101-1234561"),
    "TH": ("1-2345-67890-12-1", "1-2345-67890-12-2"),
    "US": ("123-45-6789", "000-45-6789"),
}


@pytest.mark.parametrize("country", NUMBERS)
def test_identity_numbers_by_country(country):
    right, wrong = NUMBERS_OF[country]
    assert mask(f"no. {right}, yes", ("id",))[0] == "no. <ID>, yes"
    assert mask(f"no. {wrong}, yes", ("id",))[0] == f"no. {wrong}, yes"


def test_verhoeff_finds_every_wrong_digit():
    assert verhoeff("2363") and sum(verhoeff(f"236{digit}") for digit in range(10)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("我的电话是13812345678，谢谢", "我的电话是<PHONE>，谢谢"),
        ("请打138 1234 5678找他", "请打<PHONE>找他"),
        ("身份证11010519491231002X号", "身份证<ID>号"),
        ("写信给ann@example.org谢谢", "写信给<EMAIL>谢谢"),
        ("地址192.168.0.17上", "地址<IP>上"),
        ("卡号4111111111111111有效", "卡号<CARD>有效"),
        ("電話は090-1234-5678です", "電話は<PHONE>です"),
        ("订单13812345678901，共10000000000元", "订单13812345678901，共10000000000元"),
    ],
)
def test_personal_data_is_found_without_spaces_around_it(text, expected):
    assert mask(text, tuple(KINDS))[0] == expected


def test_a_mixed_corpus_is_kept_and_decodes_to_itself(tmp_path):
    english = (
        "The attention mechanism lets a model look at all of the words, and weigh them by how well they match. With it "
        "the results of many heads are joined to be read by the next layer. It costs about as much as one head, and it "
        "is the part of a model that most of the work goes into, as long as the text is long. Short texts have others."
    )
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*TEXTS.values(), english)))
    config = PrepareConfig(cleaning=Cleaning(), vocab_size=500, held_out=0.3)
    corpus = prepare_at(find_sources([str(path)]), tmp_path / "corpus", config, progress=False)
    report = Report.from_dict(json.loads((tmp_path / "corpus" / "report.json").read_text()))
    assert report.kept == 4 and not report.dropped
    tokenizer = corpus.tokenizer()
    for text in TEXTS.values():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
