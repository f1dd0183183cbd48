from dare_agg.nvflare.controller import DareFedAvg as DareFedAvg
from dare_agg.nvflare.filter import DareFilter as DareFilter
from dare_agg.nvflare.recipe import DareRecipe as DareRecipe
from dare_agg.nvflare.recipe import NumpyDareRecipe as NumpyDareRecipe
