// Values under the pointer, in every chart. The page is complete without this; it writes text only, never markup.
for (const sheet of document.querySelectorAll("rect.sheet")) {
  const { low, high, name: axis, series } = JSON.parse(sheet.dataset.curves);
  const figure = sheet.closest("figure"), cursor = sheet.previousElementSibling;
  const tip = figure.appendChild(document.createElement("div"));
  tip.className = "tip";
  const hide = () => { tip.style.display = "none"; cursor.style.visibility = "hidden"; };
  sheet.addEventListener("pointerleave", hide);
  sheet.addEventListener("pointermove", (event) => {
    const box = sheet.getBoundingClientRect(), outer = figure.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width, wanted = low + share * (high - low);
    const lines = series.filter((s) => s.x.length).map((s) => {
      const nearest = s.x.reduce((best, x, i) => Math.abs(x - wanted) < Math.abs(s.x[best] - wanted) ? i : best, 0);
      return { ...s, at: s.x[nearest], value: s.values[nearest] };
    });
    tip.replaceChildren(...lines.map((s) => {
      const line = document.createElement("div"), name = document.createElement("span");
      line.className = "c" + s.color;
      name.textContent = "\u25cf ";
      line.append(name, `${s.label}: ${s.value} at ${axis} ${s.at}`);
      return line;
    }));
    const place = sheet.x.baseVal.value + share * sheet.width.baseVal.value;
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.style.visibility = "visible";
    tip.style.display = "block";
    const left = event.clientX - outer.left + 14;
    tip.style.left = Math.max(0, left + tip.offsetWidth > outer.width ? left - tip.offsetWidth - 28 : left) + "px";
    tip.style.top = event.clientY - outer.top + 10 + "px";
  });
}
