"""The main job, run small, leaves a model card with numbers."""


def test_the_card_of_the_main_jobs_twin_has_its_numbers(workplace, main_job):
    text = (workplace / "runs" / "tiny-demo" / "sparse" / "README.md").read_text()
    assert "Nothing was measured" not in text and "Measured on the weights in this folder" in text
    lines = [line for line in text.splitlines() if line.startswith("| held-out cross entropy")]
    assert [line.split(" | ")[3] for line in lines] == [
        "unigram frequencies of the same text",
        "the dense model",
    ]
    assert "| single_double_quote: nodes, lower is better |" in text
    assert "examples/train_bridge.py --dense tiny" in text and "| sparse twin of | tiny |" in text
