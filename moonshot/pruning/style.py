"""How a report looks as a page: light and dark, wide and narrow."""

# Eight colours that stay apart for the colour-blind too (after Okabe and Ito), on white and on black.
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#5b4fa0", "#6b6b6b")
_DARK = ("#5fb2e6", "#ff9a52", "#3cc89c", "#e7a3c7", "#d9c04a", "#9ad5f7", "#a79cf0", "#a8a8a8")


def _colours(palette: tuple[str, ...]) -> str:
    return "".join(f"--k{number}:{colour};" for number, colour in enumerate(palette))


_KINDS = "".join(
    f"line.k{k}{{stroke:var(--k{k})}}circle.k{k}{{fill:var(--k{k})}}i.k{k}{{background:var(--k{k})}}"
    for k in range(len(_LIGHT))
)

STYLE = f"""
:root{{color-scheme:light dark;--page:#fff;--ink:#1d2530;--soft:#5b6673;--rule:#dfe3e8;--panel:#f4f6f8;--bar:#cfe0f0;
--warn:#fff4de;--warnrule:#e0a63a;{_colours(_LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{--page:#14181d;--ink:#e4e8ec;--soft:#9aa5b1;--rule:#2e363f;--panel:#1d232a;
--bar:#23425f;--warn:#33291a;--warnrule:#a87b2c;{_colours(_DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}}
main{{max-width:1100px;margin:0 auto;padding:24px 20px 60px}}
h1{{font-size:1.6rem;line-height:1.25;margin:0 0 18px;overflow-wrap:anywhere}}
h2{{font-size:1.15rem;margin:0 0 10px}}
section{{margin-top:34px}}
p{{color:var(--soft);margin:6px 0}}
ul{{margin:0;padding-left:20px}}li{{overflow-wrap:anywhere}}
.figures{{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin-bottom:14px}}
.figures div{{background:var(--panel);border-radius:8px;padding:12px 14px;min-width:0}}
.figures b{{display:block;font-size:1.35rem;font-variant-numeric:tabular-nums}}
.figures span{{color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}}
.warnings{{background:var(--warn);border-left:4px solid var(--warnrule);border-radius:4px;padding:12px 16px}}
.legend{{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;padding:0;margin:0 0 8px;font-size:.9rem}}
.legend i{{display:inline-block;width:11px;height:11px;border-radius:50%;margin-right:6px}}
figure{{margin:18px 0 6px}}figcaption{{color:var(--soft);font-size:.9rem}}figcaption b{{color:var(--ink)}}
.plot{{padding:12px 8px 24px 52px}}.plot svg{{display:block;overflow:visible}}
.plot line{{stroke-width:1.3;opacity:.55}}.plot line.grid{{stroke:var(--rule);opacity:1;stroke-width:1}}
.plot .tick{{fill:var(--soft);font-size:12px;text-anchor:middle}}.plot .left{{text-anchor:end}}
{_KINDS}
.wide{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:.88rem}}
th{{text-align:left;color:var(--soft);font-weight:600;white-space:nowrap}}
th,td{{padding:4px 14px 4px 0;border-bottom:1px solid var(--rule);vertical-align:top}}
td.number{{font-variant-numeric:tabular-nums;white-space:nowrap}}
td.bar{{padding-left:6px;min-width:130px;
background:linear-gradient(var(--bar),var(--bar)) left/calc(var(--length) * 1.1px) 100% no-repeat}}
pre{{background:var(--panel);border-radius:8px;padding:12px 14px;white-space:pre-wrap;
overflow-wrap:anywhere;margin:0 0 12px}}
summary{{cursor:pointer}}summary h2{{display:inline}}details[open] summary{{margin-bottom:10px}}
@media print{{details{{display:block}}}}
"""
