"""The recipes of docs/guides/attention.md, on digits."""


def test_hedgehog_in_two_stages(run_block, tmp_path):
    ran = run_block("attention.md", "distil", tmp_path)
    found = ran["found"]
    assert ran["near"] < ran["far"]
    error = (0.04 * 0.96 / 360) ** 0.5  # of an accuracy of 96 % on 360 digits, which processors reach by other roundings
    assert found["softmax"] > 0.9 and found["fine-tuned"] > 0.9 and found["fine-tuned"] > found["distilled"] - 2 * error


def test_sparsifiner_in_three_phases(run_block, tmp_path):
    ran = run_block("attention.md", "sparsify", tmp_path)
    found = ran["found"]
    assert ran["near"] < 0.7 * ran["far"] and abs(ran["share"] - 5 / 17) < 1e-6
    assert found["all keys"] > 0.9 and found["fine-tuned"] > 0.9 and found["fine-tuned"] >= found["untrained masks"]
