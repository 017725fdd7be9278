from lm_eval.api import model as model
