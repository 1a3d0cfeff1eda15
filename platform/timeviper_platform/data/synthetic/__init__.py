"""Made corpora whose truth is exact: pictures that appear in videos at known seconds, and questions about them."""

from timeviper_platform.data.synthetic.corpus import CorpusConfig, CorpusReport, SceneCounts, make_corpus

__all__ = ["CorpusConfig", "CorpusReport", "SceneCounts", "make_corpus"]
