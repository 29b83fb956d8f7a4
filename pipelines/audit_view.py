"""What `retort verify --teacher` prints of an audit."""

from rich.console import Group, RenderableType
from rich.text import Text

from teacher_dump.audit import Audit


def view(audit: Audit) -> RenderableType:
    """A line for the rows, one for their means and the control, and one for each that is wrong."""
    rows = len(audit.rows)
    bad = [row for row in audit.rows if row.fault]
    verdict = (
        f"{len(bad)} of {rows} rows are not the teacher's"
        if bad
        else f"{rows} rows are the teacher's"
    )
    about = f"targets '{audit.targets}' against {audit.teacher}"
    if not audit.same_weights:
        about += " (other weight files than the manifest's)"
    lines = [
        f"{about}: {verdict}; {audit.identical} of {rows} to the bit (seed {audit.seed})",
        f"  captured mass {audit.mean('stored_mass'):.4f} stored, these ids have "
        f"{audit.mean('fresh_mass'):.4f} now; KL {audit.mean('kl'):.4f} nats; entropy off by "
        f"{audit.mean('entropy_error'):.4f}, log-probability of the next token by "
        f"{audit.mean('label_error'):.4f}",
        f"  control, the teacher run twice: KL {audit.mean('control_kl'):.4f} nats, off by "
        f"{audit.mean('control_error'):.4f}; {sum(row.control_changed for row in audit.rows)} of "
        f"{sum(row.predicted for row in audit.rows)} positions sampled otherwise",
    ]
    lines += [f"  shard {row.shard}, row {row.row}: {row.fault}" for row in bad]
    return Group(*(Text(line) for line in lines))
