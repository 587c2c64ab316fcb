"""Quantized arrays for JAX and Equinox."""

from . import formats as formats, lora as lora, rules as rules
from ._array import QuantizedArray as QuantizedArray
from ._audit import Audit as Audit, audit as audit
from ._daylight import (
    AuditRow as AuditRow,
    MaterializeError as MaterializeError,
    MaterializeWarning as MaterializeWarning,
    on_materialize as on_materialize,
    set_on_materialize as set_on_materialize,
    strict as strict,
)
from ._description import (
    describe as describe,
    deserialise_filter_spec as deserialise_filter_spec,
    from_description as from_description,
    serialise_filter_spec as serialise_filter_spec,
)
from ._dispatch import register as register
from ._implicit import Implicit as Implicit, implicit as implicit, is_implicit as is_implicit
from ._implicit_array import (
    ImplicitArray as ImplicitArray,
    safe_delete as safe_delete,
    safe_materialize as safe_materialize,
)
from ._matmul import matmul_bf16_int8_weight_only as matmul_bf16_int8_weight_only
from ._model import materialize as materialize, quantize as quantize
from ._report import plan as plan, Report as Report, report as report, ReportRow as ReportRow
from ._scaled import (
    AbstractScaledArray as AbstractScaledArray,
    CodedScale as CodedScale,
    StoredFactor as StoredFactor,
)
from ._training import (
    fake_quantize as fake_quantize,
    LearnedStep as LearnedStep,
    ste as ste,
    trainable as trainable,
)
from ._transposed import column_major as column_major, ColumnMajor as ColumnMajor
from .formats import (
    Array1B as Array1B,
    Array8B as Array8B,
    ArrayFP8 as ArrayFP8,
    ArrayInt4 as ArrayInt4,
    ArrayNF4 as ArrayNF4,
    ArrayNVFP4 as ArrayNVFP4,
    RSROperatorBinary as RSROperatorBinary,
    RSROperatorTernary as RSROperatorTernary,
)


__version__ = "0.1.0"
