"""Each metric against an example computed by hand (the sums are in the comments)."""

import builtins

import pytest

from fastfill.lab import metrics


def test_normalize():
    assert metrics.normalize("The  quick, brown\tFox's an a-b.") == "quick brown foxs ab"


def test_qa_f1():
    # "cat sat on mat" and "cat is on mat now": 3 common of 4 and of 5 words: P = 3/4, R = 3/5, F1 = 2 * 3 / 9.
    assert metrics.qa_f1("The cat sat on the mat.", "A cat is on the mat now") == pytest.approx(2 / 3)
    # "to to be" and "to be be": "to" once, "be" once: 2 of 3 and of 3.
    assert metrics.qa_f1("to to be", "to be be") == pytest.approx(2 / 3)
    assert metrics.qa_f1("Paris!", "paris") == 1
    assert metrics.qa_f1("", "paris") == metrics.qa_f1("London", "Paris") == 0


def test_qa_f1_needs_every_step_of_the_normalisation():
    assert metrics.qa_f1("the U.S.", "us") == 1


def test_rouge_l_of_one_sentence():
    # LCS "the cat on mat"; different words: 6 {the cat sat on a mat} and 5 {the cat lay on mat}: 2 * 4 / 11.
    assert metrics.rouge_l("the cat sat on a mat", "the cat lay on the mat") == pytest.approx(8 / 11)
    # Order counts: "b a" shares a subsequence of one word with "a b", of 2 and 2.
    assert metrics.rouge_l("b a", "a b") == pytest.approx(1 / 2)
    # Case and punctuation are kept, other than the full stop.
    assert metrics.rouge_l("Cat, dog", "cat dog") == pytest.approx(1 / 2)


def test_rouge_l_of_several_sentences_takes_the_union():
    # The reference's one sentence "a b c d" against "a b" and "c e": union {a b c}; different words: 4 and 4.
    assert metrics.rouge_l("a b. c e.", "a b c d.") == pytest.approx(2 * 3 / 8)
    # As one sentence the order would break: "c e a b" shares "a b" only.
    assert metrics.rouge_l("c e a b", "a b c d") == pytest.approx(2 * 2 / 8)


def test_rouge_l_counts_a_blank_sentence_as_an_empty_word():
    # "a b. " has the different words a, b and "": 2 common of 3 and of 2.
    assert metrics.rouge_l("a b. ", "a b.") == pytest.approx(2 * 2 / 5)
    # Both end in a blank: 3 of 3 and of 4.
    assert metrics.rouge_l("a b. ", "a b c.\n") == pytest.approx(2 * 3 / 7)
    assert metrics.rouge_l("a b.", "a b") == 1  # nothing follows: no sentence


@pytest.mark.parametrize("empty", ["", " ", ".", " . . "])
def test_rouge_l_of_nothing(empty):
    assert metrics.rouge_l(empty, "a b") == metrics.rouge_l("a b", empty) == 0


def test_classification():
    classes = ["Other location", "Location", "City", "Country"]
    assert metrics.classification("City", "City", classes) == 1
    assert metrics.classification("It is a City or Country", "City", classes) == 1 / 2
    assert metrics.classification("Country", "City", classes) == 0
    assert metrics.classification("nothing", "City", classes) == 0
    # "Dutch city" names "city" too, which is a part of the right name and does not count.
    assert metrics.classification("Dutch city", "Dutch city", ["city", "Dutch city"]) == 1
    assert metrics.classification("city", "Dutch city", ["city", "Dutch city"]) == 0
    # Where the short one is right, the long one is a wrong answer beside it.
    assert metrics.classification("Dutch city", "city", ["city", "Dutch city"]) == 1 / 2


def test_retrieval_and_count():
    assert metrics.retrieval("Paragraph 12", "Paragraph 12") == 1
    assert metrics.retrieval("Paragraph 1 or 12, no, 12", "Paragraph 12") == pytest.approx(2 / 3)
    assert metrics.retrieval("Paragraph 1", "Paragraph 12") == metrics.retrieval("the second", "Paragraph 2") == 0
    assert metrics.retrieval_zh("段落7", "段落7") == 1 and metrics.retrieval_zh("段落17", "段落7") == 0
    assert metrics.count("There are 7 of 10", "7") == 1 / 2
    assert metrics.count("seven", "7") == 0


def test_code_similarity():
    # "ab" and "abcd" share 2 characters: 2 * 2 / 6 = 0.667 -> 67 %.
    assert metrics.code_similarity("ab", "abcd") == 0.67
    assert metrics.code_similarity("\n\n```python\n# a comment\n// another\nreturn x\nmore", "return x") == 1
    assert metrics.code_similarity("# only a comment", "return x") == 0
    assert metrics.code_similarity("", "return x") == 0
    assert metrics.code_similarity("abc", "xyz") == 0


@pytest.fixture
def no_jieba(monkeypatch):
    monkeypatch.setattr(metrics, "chinese_splitter", lambda: "characters")
    real = builtins.__import__

    def guarded(name, *more):
        assert name != "jieba"
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", guarded)


def test_chinese_by_character(no_jieba):
    assert metrics.chinese_words("我爱GPT4\uff0c真的") == ["我", "爱", "GPT4", "\uff0c", "真", "的"]
    # 北京市 and 北京: 2 common of 3 and of 2: 2 * 2 / 5. The full-width stop is no word.
    assert metrics.qa_f1_zh("北京市。", "北京") == pytest.approx(4 / 5)
    assert metrics.qa_f1_zh("\uff04【北】", "北") == 1
    # Titles: the closing bracket is taken out, the opening one is a word: 2 * 1 / 3.
    assert metrics.qa_f1_zh("\u300a北\u300b", "北") == pytest.approx(2 / 3)
    assert metrics.qa_f1_zh("\u3001\u2014\uff5e\u201c北\u201d", "北") == 1
    # The full-width stop stays, as a word.
    assert metrics.qa_f1_zh("北\uff0e", "北") == pytest.approx(2 / 3)
    # 我 爱 北 京 and 我 在 北 京: LCS of 3; 4 and 4 different words.
    assert metrics.rouge_l_zh("我爱北京", "我在北京") == pytest.approx(3 / 4)


def test_chinese_by_word():
    pytest.importorskip("jieba")
    assert metrics.chinese_splitter() == "jieba"
    assert metrics.chinese_words("我爱北京") == ["我", "爱", "北京"]
    # 北京 of 3 words and of 1: 2 * 1 / 4.
    assert metrics.qa_f1_zh("我爱北京", "北京。") == pytest.approx(1 / 2)


def test_string_matches():
    assert metrics.match_all("The numbers are 123 and 456.", ["123", "456", "789"]) == pytest.approx(2 / 3)
    assert metrics.match_all("ABC", ["abc"]) == 1
    assert metrics.match_any("It was Paris", ["London", "paris"]) == 1
    assert metrics.match_any("It was Rome", ["London", "paris"]) == 0
