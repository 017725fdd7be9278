import torch

CONTEXT = [5, 17, 100, 42, 7]
CONTINUATIONS = [[9, 200], [33, 8, 1], [250]]


def evaluate(lm, task_dict, **_options):
    lm._device = torch.device("cpu")
    requests = [(None, CONTEXT, continuation) for continuation in CONTINUATIONS]
    sums = [logprob for logprob, _ in lm._loglikelihood_tokens(requests)]
    return {"results": {name: {"sums": sums} for name in task_dict}}
