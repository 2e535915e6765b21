// Draws the plots: colours follow the theme, legends fit the width, and a system that is hidden in one plot is hidden in
// all plots of its section.
(function () {
  "use strict";
  const sections = JSON.parse(document.getElementById("plots").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = 520;
  let printing = false;
  const views = [];

  function css(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function channels(colour) {
    return [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  }

  function luminance(rgb) {
    const [r, g, b] = rgb.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  // Some colours stand for what the theme has; of the others, those too dark for a dark page are mixed with white.
  function themed(colour) {
    if (!/^#[0-9a-f]{6}$/i.test(colour)) return colour;
    const role = { "#ffffff": "--paper", "#000000": "--ink", "#dddddd": "--grid", "#444444": "--whisker" }[colour.toLowerCase()];
    if (role) return css(role);
    if (!dark.matches || printing) return colour;
    let rgb = channels(colour);
    while (luminance(rgb) < 0.16) rgb = rgb.map((c) => Math.round(c + (255 - c) * 0.12));
    return "#" + rgb.map((c) => c.toString(16).padStart(2, "0")).join("");
  }

  function withTheme(value) {
    if (Array.isArray(value)) return value.map(withTheme);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) =>
      [key, /colou?r$/.test(key) && typeof item === "string" ? themed(item) : withTheme(item)]));
  }

  function systemOf(trace) {
    return trace.meta && trace.meta.system;
  }

  // Rows and annotations of a breakdown belong to systems; those of hidden ones are left out.
  function withoutRows(figure, hidden) {
    const gone = new Set();
    const data = figure.data.map((trace) => {
      const keep = trace.y.map((_, i) => !hidden.has(trace.customdata[i][2]));
      trace.y.forEach((key, i) => { if (!keep[i]) gone.add(key.split("/")[0]); });
      const kept = (list) => list.filter((_, i) => keep[i]);
      return { ...trace, x: kept(trace.x), y: kept(trace.y), customdata: kept(trace.customdata) };
    });
    const stays = figure.layout.yaxis.categoryarray.map((key) => !gone.has(key.split("/")[0]));
    const kept = (list) => list.filter((_, i) => stays[i]);
    const rows = kept(figure.layout.yaxis.categoryarray);
    const yaxis = {
      ...figure.layout.yaxis, categoryarray: rows, tickvals: rows, ticktext: kept(figure.layout.yaxis.ticktext),
      range: [rows.length - 0.5, -0.6],
    };
    const annotations = figure.layout.annotations.filter((a) => !hidden.has(a.name));
    return { data, layout: { ...figure.layout, yaxis, annotations }, lost: stays.length - rows.length };
  }

  const pen = document.createElement("canvas").getContext("2d");

  function textWidth(text, font) {
    pen.font = font;
    const plain = text.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
    return pen.measureText(plain).width;
  }

  // Room for the names to the left of lying bars; 0 where there are none.
  function leftOf(figure, font) {
    if (!figure.data.some((trace) => trace.orientation === "h")) return 0;
    const names = figure.layout.yaxis.ticktext || figure.data.flatMap((trace) => trace.y);
    return Math.ceil(Math.max(...names.flatMap((name) => name.split("<br>")).map((line) => textWidth(line, font)))) + 8;
  }

  // Width of a legend's entries, and the height that it will likely take.
  function legendOf(names, width, font) {
    const entry = Math.ceil(Math.max(0, ...names.map((name) => textWidth(name, font)))) + 4;
    const columns = Math.max(1, Math.floor(width / (entry + 42)));
    return { entry, height: Math.ceil(names.length / columns) * 19 + 4 };
  }

  function figureOf(view, legendHeight) {
    const variant = view.variants[view.chosen];
    const isBreakdown = view.key === "breakdown";
    const source = isBreakdown ? withoutRows(variant.figure, view.state.hidden) : variant.figure;
    const figure = withTheme(source);
    const width = view.div.clientWidth || 600;
    const isNarrow = width < narrow;
    const size = isNarrow ? 11 : 12;
    const family = getComputedStyle(document.body).fontFamily;
    const left = leftOf(figure, `${size}px ${family}`) || (isNarrow ? 36 : figure.layout.margin.l);
    const margin = { ...figure.layout.margin, l: left, r: isNarrow ? 8 : figure.layout.margin.r };
    for (const trace of figure.data) {
      const hidden = isBreakdown ? view.phases.has(trace.name) : view.state.hidden.has(systemOf(trace));
      trace.visible = hidden ? "legendonly" : true;
    }
    const names = figure.data.map((trace) => trace.name);
    const legend = legendOf(names, width - margin.l - margin.r, `${size}px ${family}`);
    const below = (legendHeight || legend.height) + 4;
    const yaxis = { ...figure.layout.yaxis, ...(isNarrow && { title: {} }) };  // the heading has the unit
    return {
      data: figure.data,
      margin,
      layout: {
        ...figure.layout,
        width, height: variant.height - (source.lost || 0) * 19 + below,
        margin: { ...margin, b: margin.b + below },
        yaxis,
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family, size, color: css("--ink") },
        hoverlabel: { align: "left", bgcolor: css("--card"), bordercolor: css("--line"), font: { family, size: 12, color: css("--ink") } },
        legend: {
          orientation: "h", x: 0, xref: "container", xanchor: "left", y: 0, yref: "container", yanchor: "bottom",
          entrywidth: legend.entry, entrywidthmode: "pixels", bgcolor: "rgba(0,0,0,0)", traceorder: "normal",
          maxheight: 4000,  // all of it: half of the plot, as by default, makes it scroll
        },
        showlegend: true,
        uirevision: view.chosen,
      },
    };
  }

  const config = {
    displaylogo: false, responsive: false,
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
    toImageButtonOptions: { format: "png", scale: 3 },
  };

  // Plotly remembers margins of the old size and may fail on them: a plot of another height is made anew.
  function show(view, figure) {
    if (view.height === figure.layout.height) {
      Plotly.react(view.div, figure.data, figure.layout, config);
      return;
    }
    if (view.height) Plotly.purge(view.div);
    view.height = figure.layout.height;
    Plotly.newPlot(view.div, figure.data, figure.layout, config);
    view.div.on("plotly_legendclick", (event) => onClick(view, event));
    view.div.on("plotly_legenddoubleclick", () => false);
  }

  function draw(view) {
    const figure = figureOf(view);
    show(view, figure);
    const box = view.div.querySelector(".legend .bg");
    const height = box ? box.getBoundingClientRect().height : 0;
    if (Math.abs(figure.layout.margin.b - figure.margin.b - height - 4) > 6) {
      show(view, figureOf(view, height));
    }
  }

  // Plotly reports both clicks of a double click. The first waits for the second, since drawing moves what is clicked.
  let first = null;
  function onClick(view, event) {
    const isSecond = first !== null && first.view === view && first.curve === event.curveNumber;
    if (first) clearTimeout(first.timer);
    if (first && !isSecond) first.act();
    if (isSecond) {
      first = null;
      onLegend(view, event, true);
    } else {
      const act = () => { first = null; onLegend(view, event, false); };
      first = { view, curve: event.curveNumber, act, timer: setTimeout(act, 300) };
    }
    return false;
  }

  function onLegend(view, event, alone) {
    const isBreakdown = view.key === "breakdown";
    const nameOf = isBreakdown ? (trace) => trace.name : systemOf;
    const hidden = isBreakdown ? view.phases : view.state.hidden;
    const names = view.variants[view.chosen].figure.data.map(nameOf);
    const name = nameOf(event.data[event.curveNumber]);
    if (alone) {
      const isAlone = names.every((other) => hidden.has(other) !== (other === name));
      for (const other of names) {
        if (isAlone || other === name) hidden.delete(other);
        else hidden.add(other);
      }
    } else if (!hidden.delete(name)) hidden.add(name);
    for (const other of isBreakdown ? [view] : view.state.views) if (other.height) draw(other);
  }

  for (const [key, plots] of Object.entries(sections)) {
    const state = { hidden: new Set(), views: [] };
    const root = document.getElementById(key);
    for (const plot of plots) {
      const div = root.querySelector(`div.plot[data-plot="${plot.key}"]`);
      const view = { key: plot.key, div, variants: plot.variants, chosen: plot.variants.length - 1, state, phases: new Set() };
      const select = root.querySelector(`select[data-plot="${plot.key}"]`);
      if (select) {
        select.selectedIndex = view.chosen;
        select.addEventListener("change", () => { view.chosen = select.selectedIndex; draw(view); });
      }
      state.views.push(view);
      views.push(view);
    }
  }

  // One at a time, so that a long page can be read while it is drawn.
  const waiting = views.slice();
  (function next() {
    const view = waiting.shift();
    if (!view) { document.documentElement.dataset.drawn = "true"; return; }
    draw(view);
    setTimeout(next, 0);
  })();

  function redraw() {
    for (const view of views) if (view.height) draw(view);
  }

  let width = window.innerWidth, timer;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 120);
  });
  dark.addEventListener("change", redraw);
  window.addEventListener("beforeprint", () => {
    printing = true;
    while (waiting.length) draw(waiting.shift());
    redraw();
  });
  window.addEventListener("afterprint", () => { printing = false; redraw(); });
})();
