import types

ALL_TASKS = ["fixed"]


def initialize_tasks():
    pass


def get_task_dict(names):
    return {name: types.SimpleNamespace(_config={"num_fewshot": 0}) for name in names}
