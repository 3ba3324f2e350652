from lm_eval.models.huggingface import HFLM


class HubMoeLM(HFLM):
    def __init__(self, *a, reuse_prefix=True, **k):
        super().__init__(*a, **k)
        self.reuse_prefix = False
