class CacheHook:
    def __init__(self, _cache):
        pass

    def add_partial(self, *_args):
        pass
