class HFLM:
    @property
    def model(self):
        return self._model
