"""Made corpora whose truth is exact: pictures that appear in videos at known seconds, and questions about them.

make_corpus(CorpusConfig(output="outputs/demo/corpus"))
"""
