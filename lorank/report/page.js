// Values under the pointer: of every line at the nearest x, or of the nearest point.
const tip = document.querySelector(".tip");
for (const svg of document.querySelectorAll("svg.chart")) {
  const series = JSON.parse(svg.dataset.points), hair = svg.querySelector(".hair");
  const hide = () => { tip.style.display = "none"; hair.style.visibility = "hidden"; };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), zoom = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * zoom, y = (event.clientY - box.top) * zoom;
    const away = (p) => svg.dataset.mode === "x" ? Math.abs(p[0] - x) : Math.hypot(p[0] - x, p[1] - y);
    let near = series.filter((s) => s[2].length).map(([name, style, points]) =>
      ({ name, style, point: points.reduce((a, b) => (away(b) < away(a) ? b : a)) }));
    const first = near.reduce((a, b) => (away(b.point) < away(a.point) ? b : a));
    if (away(first.point) > 60) return hide();
    const at = first.point[0];
    near = svg.dataset.mode === "x" ? near.filter((s) => Math.abs(s.point[0] - at) < 14) : [first];
    near.sort((a, b) => a.point[1] - b.point[1]);
    const head = document.createElement("div");
    head.textContent = first.point[2];
    tip.replaceChildren(head, ...near.map((s) => {
      const row = document.createElement("div"), name = document.createElement("b"), value = document.createElement("span");
      name.className = s.style; name.textContent = s.name; value.textContent = s.point[3];
      row.append(value, name);
      return row;
    }));
    hair.setAttribute("x1", at); hair.setAttribute("x2", at);
    hair.style.visibility = svg.dataset.mode === "x" ? "visible" : "hidden";
    tip.style.display = "block";
    const left = event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - tip.offsetWidth - 16 : event.clientX + 16;
    tip.style.left = Math.max(6, left) + "px";
    tip.style.top = Math.max(6, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)) + "px";
  });
}
