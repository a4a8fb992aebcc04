"""The style sheet of `clipmill.tools.html`."""

STYLE = """
:root{--bg:#f6f7f8;--card:#fff;--ink:#1b1f24;--muted:#59636e;--line:#d9dde2;--warn:#9a5b00;--warn-bg:#fff6e5;
--c0:#0969c8;--c1:#c4500a;--c2:#0a8064;--c3:#a3387f;--c4:#2f8fc4;--c5:#a87400;--c6:#5b6570;--c7:#7a4fd0}
@media (prefers-color-scheme:dark){:root{--bg:#121518;--card:#1b1f24;--ink:#e7eaee;--muted:#a0aab5;--line:#333b44;
--warn:#f2c063;--warn-bg:#2e2614;--c0:#5aaeff;--c1:#ff9a5c;--c2:#41cfa4;--c3:#ea94ca;--c4:#8fd0f5;--c5:#eec04f;
--c6:#b3bcc6;--c7:#b79bff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
overflow-wrap:break-word}
header,main{max-width:1160px;margin:0 auto;padding:0 16px}
header{padding-top:28px}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.15rem;margin:0 0 12px}
h3{font-size:.95rem;margin:16px 0 8px}
p{margin:0 0 10px}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.muted,figcaption,caption{color:var(--muted)}
nav{display:flex;flex-wrap:wrap;gap:6px;margin:12px 0 0}
nav a{color:var(--c0);text-decoration:none;border:1px solid var(--line);border-radius:999px;padding:2px 12px;
background:var(--card)}
nav a:hover,nav a:focus-visible{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px;margin:16px 0;
scroll-margin-top:12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(132px,1fr));gap:10px;margin:0 0 14px}
.tiles div{border:1px solid var(--line);border-radius:8px;padding:8px 12px}
.tiles dt{color:var(--muted);font-size:.82rem}
.tiles dd{margin:0;font-size:1.2rem;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:8px 28px;align-items:start}
.note{border-left:4px solid var(--c0);padding:6px 12px;background:var(--bg);border-radius:4px}
.note.warn{border-color:var(--warn);background:var(--warn-bg)}
.note.warn strong{color:var(--warn)}
.scroll{overflow-x:auto}
.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
table{border-collapse:collapse;font-size:.9rem;margin:0 0 12px}
.scroll table{width:max-content;min-width:min(100%,280px)}
caption{text-align:left;padding:4px 0;font-size:.88rem}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
thead th{white-space:nowrap}
td{max-width:60ch}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bars{width:100%;max-width:640px;table-layout:fixed}
.bars th,.bars td{border-bottom:0;padding:3px 12px 3px 0;vertical-align:middle}
.bars th{font-weight:400;width:27%;overflow-wrap:anywhere}
.bars .num{width:33%;padding-right:0}
.bar{height:12px;border-radius:3px;min-width:1px}
figure{margin:0 0 14px}
figcaption{font-size:.86rem;margin-top:4px}
.chart svg{width:100%;max-width:560px;height:auto;display:block}
.chart h3{margin:4px 0}
.chart text{font-size:10.5px;fill:var(--muted)}
.chart .label{font-size:11px;fill:var(--ink)}
.rule{stroke:var(--line);stroke-width:1;fill:none}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.column{fill:var(--c0)}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;padding:0;margin:4px 0;font-size:.86rem}
.legend svg{width:24px;height:8px;margin-right:6px;vertical-align:middle;display:inline-block}
.picture img{display:block;max-width:100%;height:auto;border-radius:4px}
.strip img{display:block;width:100%;min-width:560px;height:auto;border-radius:4px}
.sound img{height:96px;image-rendering:auto}
details{border-top:1px solid var(--line);padding-top:8px;margin-top:8px}
summary{cursor:pointer;font-weight:600;margin-bottom:6px}
.cards>div{border-top:1px solid var(--line);padding-top:10px;margin-top:14px}
.views{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:4px 24px}
.cards>div:first-child{border-top:0;padding-top:0;margin-top:0}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}
.c4{stroke:var(--c4)}.c5{stroke:var(--c5)}.c6{stroke:var(--c6)}.c7{stroke:var(--c7)}
.b0{background:var(--c0)}.b1{background:var(--c1)}.b2{background:var(--c2)}.b3{background:var(--c3)}
.b4{background:var(--c4)}.b5{background:var(--c5)}.b6{background:var(--c6)}.b7{background:var(--c7)}
@media (max-width:480px){header,main{padding:0 10px}section{padding:12px}h1{font-size:1.3rem}}
@media print{section{break-inside:avoid;border:0}nav{display:none}}
"""
