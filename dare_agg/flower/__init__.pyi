from dare_agg.flower.around import dare as dare
from dare_agg.flower.mod import dare_mod as dare_mod
from dare_agg.flower.reception import offer_base as offer_base
from dare_agg.flower.records import STATISTICS_KEY as STATISTICS_KEY
from dare_agg.flower.round_outcome import RoundOutcome as RoundOutcome
from dare_agg.flower.strategy import DareStrategy as DareStrategy
