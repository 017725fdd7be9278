import logging

eval_logger = logging.getLogger("lm_eval")


class Reorderer:
    def __init__(self, values, key):
        self.order = sorted(range(len(values)), key=lambda n: key(values[n]))
        self.values = values

    def get_reordered(self):
        return [self.values[n] for n in self.order]

    def get_original(self, results):
        original = [None] * len(results)
        for n, result in zip(self.order, results, strict=True):
            original[n] = result
        return original


def chunks(values, size):
    values = list(values)
    for start in range(0, len(values), size):
        yield values[start : start + size]


def get_git_commit_hash():
    return ""
